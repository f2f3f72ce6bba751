"""LoRA and rsLoRA, for linear layers, Conv1D and embeddings, quantized or not."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.adapters.base import LayerAdapter, Slot, Slots
from tunekit.adapters.blocks.expert_lora import ExpertLora, conflicts
from tunekit.adapters.blocks.lora_fields import LORA_FIELDS, lora_side
from tunekit.adapters.blocks.low_rank_layer import low_rank_update, scaling_of
from tunekit.adapters.blocks.plain_lora import as_plain_lora
from tunekit.adapters.kernels.joined_lora import JoinedLayers, JoinedProducts
from tunekit.adapters.method import Method
from tunekit.adapters.starts.start import StartLayer, make_factors
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.records import Target


class Lora(LayerAdapter[LowRankSettings]):
    """Low-rank update: y = W x + s B A x, s = alpha / r, or alpha / sqrt(r) with rsLoRA.

    Shapes: x (..., I) -> y (..., O); A (R, I); B (O, R). For an embedding: ids x (...), A (R, V), B (D, R), y = (W + s
    (B A)^T)[x].
    Starts as the identity: B = 0 (embedding: A = 0), or as the initialisation in adapters/starts/ defines.
    Source: Hu et al. 2021, eq. 3; Kalajdzievski 2023.
    """

    kinds = frozenset({"linear", "conv1d", "embedding"})
    A: nn.Parameter
    B: nn.Parameter
    own_bias: nn.Parameter  # if biases are trained: replaces the base's bias
    update_bias: nn.Parameter  # (O,) b, with lora_bias: y = W x + s (B A x + b)
    start_A: Tensor  # A' (R, I) and B' (O, R) of starts that move a part of W into A and B
    start_B: Tensor
    joined: JoinedLayers | None = None  # the group of layers that the kernel computes together with this layer

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> Slots:
        rank, inputs, outputs = target.r or settings.r, target.in_features, target.out_features
        if target.kind == "embedding":
            a = Slot("lora_embedding_A", (rank, inputs), rate="embedding")
            return {"A": a, "B": Slot("lora_embedding_B", (outputs, rank), rate="embedding")}
        slots = {"A": Slot("lora_A.weight", (rank, inputs)), "B": Slot("lora_B.weight", (outputs, rank), rate="b")}
        if getattr(settings, "lora_bias", False):
            slots["update_bias"] = Slot("lora_B.bias", (outputs,), decays=False)
        if settings.bias != "none" and target.has_bias:
            slots["own_bias"] = Slot("base_layer.bias", (outputs,), decays=False)
        if settings.start.moves_weights:  # y = W x + s (B A - B' A') x: exactly W x at the start, and W is not changed
            slots["start_A"] = Slot("start_A", (rank, inputs), kind="resume")
            slots["start_B"] = Slot("start_B", (outputs, rank), kind="resume")
        return slots

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        if self.target.kind == "embedding":
            nn.init.normal_(self.B, generator=generator)
        else:
            self.initialise_from(generator, None)
        if "own_bias" in self.declared:
            bias = self.base_layer.bias
            self.own_bias.data.copy_(torch.zeros_like(self.own_bias) if bias.is_meta else bias.detach())

    def initialise_from(self, generator: torch.Generator, evidence: object) -> None:
        """Initialise A and B by the recipe's `start`. If `start` moves a part of W into A and B, their initial values
        are saved too."""
        (rank, inputs), outputs = self.A.shape, self.B.shape[0]
        weight = self.base_weight().read
        layer = StartLayer(self.target.name, inputs, outputs, rank, self.scaling, generator, weight, evidence)
        a, b = make_factors(self.settings.start, layer)
        values = {"A": a, "B": b, "start_A": a, "start_B": b}
        for attribute in values.keys() & self.declared.keys():
            getattr(self, attribute).data.copy_(values[attribute])

    @property
    def scaling(self) -> float:
        """The scaling s."""
        return scaling_of(self.target, self.settings.r, self.settings.alpha, self.settings.use_rslora)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors A and B of the update. If the initialisation moved a part of W into A' and B', the update is B A
        - B' A'. Its factors are [A; A - A'] (2R, I) and [B - B', B'] (O, 2R).

        In this form, no large terms cancel, in any precision of the product.
        """
        if "start_A" not in self.declared:
            return self.A, self.B
        return torch.cat([self.A, self.A - self.start_A]), torch.cat([self.B - self.start_B, self.start_B], dim=1)

    def update(self, x: Tensor) -> Tensor:
        if self.target.kind != "embedding":
            y = low_rank_update(self.apply_dropout(x), self.factors(), self.scaling)
            return y + (self.update_bias * self.scaling).to(y.dtype) if "update_bias" in self.declared else y
        a, b = (factor.to(self.base_layer.weight.dtype) for factor in self.factors())
        rows = F.embedding(x, a.t(), self.base_layer.padding_idx)  # (..., R)
        scale = self.scaling * getattr(self.base_layer, "embed_scale", 1.0)  # Gemma multiplies W[x] as well
        return F.linear(rows, b) * scale

    @property
    def is_additive(self) -> bool:
        return type(self).adapted is Lora.adapted and "own_bias" not in self.declared

    @property
    def is_thin(self) -> bool:
        return self.target.kind != "embedding" and "update_bias" not in self.declared

    def thin_factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.factors()
        return a, b * self.scaling

    def delta(self) -> Tensor:
        """The change s B A of the layer's matrix, (O, I), or (V, D) for an embedding; on the device of A and B."""
        a, b = self.factors()
        delta = b @ a * self.scaling
        return delta.t() if self.target.kind == "embedding" else delta

    def low_rank(self, base_matrix: Callable[[], Tensor]) -> tuple[Tensor, Tensor] | None:
        return self.thin_factors()

    def effective_bias(self) -> Tensor | None:
        """The bias (O,) that the layer uses: the trained bias if there is one, otherwise the base's bias."""
        return self.own_bias if "own_bias" in self.declared else getattr(self.base_layer, "bias", None)

    def base_output(self, x: Tensor) -> Tensor:
        """W x plus `effective_bias`, (..., O)."""
        y = super().base_output(x)
        return y + (self.own_bias - self.base_layer.bias).to(y.dtype) if "own_bias" in self.declared else y

    def adapted(self, x: Tensor) -> Tensor:
        joined = None if self.joined is None else self.joined.product(self, x)
        return super().adapted(x) if joined is None else joined

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = self.own_bias.detach().to(weight.device) if "own_bias" in self.declared else bias
        if "update_bias" in self.declared:
            added = (self.update_bias.detach() * self.scaling).to(weight.device)  # (O,)
            bias = added if bias is None else bias + added
        return super().merged(weight, bias)


METHOD = Method(
    peft=lora_side(LoraSettings, {**LORA_FIELDS, "lora_bias": ("lora_bias", False)}),
    layer=Lora,
    parameter=ExpertLora,
    kernel=JoinedProducts(Lora),
    written_form=as_plain_lora,
    tensors=("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
    unbinding=frozenset({"start"}),
    conflicts=conflicts,
    in_diffusers_file=True,
)
