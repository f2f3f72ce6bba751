"""LoRA of fused expert weights: a parameter (E, O, I), or (E, I, O)."""

from collections.abc import Sequence

from torch import Generator, nn

from tunekit.adapters.base import Slot, Slots
from tunekit.adapters.blocks.lora_fields import start_conflicts
from tunekit.adapters.blocks.low_rank_layer import scaling_of
from tunekit.adapters.expert_parameters import Factors, Index, ParameterAdapter
from tunekit.adapters.method import Conflict
from tunekit.adapters.starts.start import StartLayer, make_factors
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.records import Target


class ExpertLora(ParameterAdapter[LowRankSettings]):
    """A low-rank update of every expert's matrix: y = W_e x + s B_e A_e x, with LoRA's s.

    Shapes: A (R E, I), ordered by expert; B (O, R E), ordered by rank, as PEFT stores them. Starts as the identity: B
    = 0.
    If a module has several adapted parameters, PEFT nests one wrapper per parameter; the first parameter's wrapper is
    innermost. Only the names of the tensors show to which parameter a wrapper belongs.
    Source: Hu et al. 2021, eq. 3.
    """

    A: nn.Parameter
    B: nn.Parameter

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> Slots:
        rank = (target.r or settings.r) * (target.experts or 1)
        nesting = "base_layer." * target.wrapped
        return {
            "A": Slot(f"{nesting}lora_A.weight", (rank, target.in_features)),
            "B": Slot(f"{nesting}lora_B.weight", (target.out_features, rank), rate="b"),
        }

    @classmethod
    def file_key(cls, name: str) -> str:
        """The tensor's key in PEFT's file. PEFT omits the parameter's own name."""
        wrapped, _, factor = name.rpartition(".lora_")
        inner = wrapped
        while inner.endswith(".base_layer"):
            inner = inner.removesuffix(".base_layer")
        owner = inner.rpartition(".")[0]
        return f"{cls.file_prefix}{owner}{wrapped.removeprefix(inner)}.lora_{factor}"

    def initialise(self, generator: Generator) -> None:
        target, rank = self.target, self.target.r or self.settings.r
        layer = StartLayer(
            *(target.name, target.in_features, target.out_features, rank, self.scaling, generator),
            weight=lambda: self.parameter,
            evidence=None,
            experts=target.experts or 1,
        )
        a, b = make_factors(self.settings.start, layer)
        self.A.data.copy_(a)
        self.B.data.copy_(b)

    @property
    def scaling(self) -> float:
        """The scaling s."""
        return scaling_of(self.target, self.settings.r, self.settings.alpha, self.settings.use_rslora)

    def factors(self, index: Index) -> Factors:
        experts = self.target.experts
        if experts is None:  # a plain matrix instead of fused experts
            return self.B * self.scaling, self.A
        a = self.A.reshape(experts, -1, self.A.shape[1])[index]  # (..., R, I)
        b = (self.B * self.scaling).reshape(self.B.shape[0], -1, experts).permute(2, 0, 1)[index]  # (..., O, R)
        return (a.transpose(-2, -1), b.transpose(-2, -1)) if self.target.transposed else (b, a)


def conflicts(settings: LowRankSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    """Lists the settings that do not fit these layers or fused parameters. Used as Method.conflicts."""
    problems = start_conflicts(settings, targets, file)
    if not settings.target_parameters:
        return problems
    if settings.dropout:
        what = "the update of fused parameters changes the weights, so dropout cannot act on its input"
        problems.append(
            Conflict("lora_dropout" if file else "dropout", what, "write dropout: 0, or no target_parameters")
        )
    if not file and not settings.start.fills_experts:
        what = f"start: {settings.start.method} cannot initialise fused parameters"
        problems.append(Conflict("start", what, "write start: default or gaussian, or no target_parameters"))
    named = [f".{name}." for name in settings.modules_to_save]  # by whole names, or by endings
    copied = [target.name for target in targets if any(name in f".{target.name}" for name in named)]
    if copied:
        what = f"'{copied[0]}' is inside a module of modules_to_save, which is fully trained"
        problems.append(Conflict("target_parameters", what, "remove it from target_parameters or from modules_to_save"))
    return problems
