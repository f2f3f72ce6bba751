"""Strict reading of LoRA folders of tunekit or PEFT, without their base: a tensor that the configuration does not
allow is an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunekit.adapters.base import AdapterPart, PeftConfig
from tunekit.adapters.folder.config import AdapterConfig, adapter_header, read_adapter_config, tensors_path
from tunekit.adapters.folder.earlier_peft import refuse_changed_patterns
from tunekit.adapters.folder.expected import BASE_COPY, FLOATS, refuse_not_finite
from tunekit.adapters.method import Method, load_method
from tunekit.adapters.patterns import Patterns
from tunekit.arithmetic.low_rank import LowRank
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError, Problem
from tunekit.files.tensors import NAMES, TensorEntry, iterate_tensors
from tunekit.files.untrusted import printable
from tunekit.records import with_article

PREFIX = AdapterPart.file_prefix
FACTORS = {  # suffix -> the factor, and whether the layer is an embedding
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"  # rows of an embedding trained one by one
SHOWN_PROBLEMS = 6
REPAIR = "copy or download the adapter's folder again, with the adapter_config.json that belongs to this file"


@dataclass(frozen=True)
class LoraFolder:
    """A LoRA adapter without its base. `rest`: all tensors other than LoRA's factors (trained copies, biases, copies of
    the base's embeddings), by file key."""

    config: AdapterConfig
    updates: dict[str, LowRank]
    rest: Tensors = field(default_factory=dict)
    target_modules: Sequence[str] | str | None = None  # as in the configuration
    fan_in_fan_out: bool = False  # PEFT's mark for Conv1D layers
    parameters: frozenset[str] = frozenset()  # layers that the configuration names as parameters, `NAME.weight`

    @property
    def name(self) -> str:
        """The folder, for messages."""
        return str(self.config.folder)


def plain_lora_method() -> Method:
    """The implementation of plain LoRA, for reading and writing adapter folders."""
    return load_method("lora")


def read_lora_folder(folder: Path, instead: PeftConfig | None = None) -> LoraFolder:
    """Read a LoRA folder completely, with factors in float32.

    `instead`: configuration fields that replace fields of the file, as in read_adapter_config.
    Raises: AdapterError for a method other than LoRA, and for all tensors that are missing, unexpected, of a wrong
    shape or type, or not finite.
    """
    config = read_adapter_config(folder, instead=instead)
    if config.method is not plain_lora_method():
        how = "convert it to the nearest LoRA with: tunekit adapter convert --rank R"
        raise AdapterError(
            f"contains {with_article(config.low_rank.method)} adapter instead of a LoRA", how, file=config.file
        )
    if getattr(config.settings, "lora_bias", False):
        what = "the adapter has a bias in each update, which the updates B A of this command do not contain"
        raise AdapterError(what, "merge it instead", file=config.file, key="lora_bias")
    path = tensors_path(config.folder)
    header = adapter_header(path)
    config = _with_tied_copies(config, header)
    factors, other_keys = _sort(config, header)
    parameters = _parameters(config, {module: header[pair["A"]].shape for module, pair in factors.items()})
    _check_shapes(config, factors, header, str(path))
    tensors = read_tensors(config, header)
    scalings = Scalings(config)
    updates: dict[str, LowRank] = {}
    for module, pair in sorted(factors.items()):
        a, b = tensors[pair["A"]].float(), tensors[pair["B"]].float()
        updates[module] = LowRank(a, b, scalings.of(module), _is_embedding(pair["A"]))
    conv1d, tied = (config.fields.get(name) is True for name in ("fan_in_fan_out", "ensure_weight_tying"))
    targets = None if tied else config.fields.get("target_modules")  # PEFT adds the tied partner of a target
    return LoraFolder(config, updates, {key: tensors[key] for key in other_keys}, targets, conv1d, parameters)


def read_tensors(config: AdapterConfig, header: Mapping[str, TensorEntry]) -> Tensors:
    """Reads all tensors of the folder's tensor file.

    Raises: AdapterError if the file was changed after tunekit wrote it, or contains NaN or infinity.
    """
    path = tensors_path(config.folder)
    config.check_files()
    tensors = dict(iterate_tensors(path, header))
    refuse_not_finite(tensors, str(path))
    return tensors


def _is_embedding(key: str) -> bool:
    return ".lora_embedding_" in key


def _sort(config: AdapterConfig, header: Mapping[str, TensorEntry]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Sorts the file's keys: LoRA's factors as module -> factor -> key, and a list of all other keys.

    Raises: AdapterError for tensors that the configuration does not allow.
    """
    factors: dict[str, dict[str, str]] = {}
    others: list[str] = []
    for key in header:
        suffix = next((suffix for suffix in FACTORS if key.endswith(suffix)), None)
        if suffix and key.startswith(PREFIX):
            module = key.removeprefix(PREFIX).removesuffix(suffix)
            factors.setdefault(module, {})[FACTORS[suffix][0]] = key
        else:
            others.append(key)
    wrong = [
        f"'{printable(key, 200)}' is not a tensor of this adapter"
        for key in others
        if not _may_be(key, config, factors)
    ]
    for module, pair in sorted(factors.items()):
        if len(pair) != 2 or _is_embedding(pair["A"]) != _is_embedding(pair["B"]):
            wrong.append(f"'{printable(module, 200)}' does not have exactly one pair of factors")
    if not factors:
        wrong.append("contains no update of a layer")
    _raise(wrong, str(tensors_path(config.folder)))
    return factors, others


def _with_tied_copies(config: AdapterConfig, header: Mapping[str, TensorEntry]) -> AdapterConfig:
    """The configuration with the modules that PEFT copies for ensure_weight_tying: the tied partner of a module in
    modules_to_save. The partner's copy has the shape of the module's copy."""
    entries = config.low_rank.modules_to_save
    if config.fields.get("ensure_weight_tying") is not True or not entries:
        return config
    shapes = {header[key].shape for key in header if _is_copy(key, entries)}
    tied = [key for key in header if header[key].shape in shapes and not _is_copy(key, entries)]
    tied = [key for key in tied if key.endswith(".weight") and not key.endswith((BASE_COPY, *FACTORS))]
    partners = (key.removeprefix(PREFIX).removesuffix(".weight") for key in tied)
    settings = config.settings.model_copy(update={"modules_to_save": (*entries, *partners)})
    return replace(config, settings=settings)


def _is_copy(key: str, entries: Sequence[str]) -> bool:
    """Whether the tensor belongs to a module in modules_to_save. PEFT compares an entry with the end of each name."""
    module = key.removeprefix(PREFIX).rpartition(".")[0]
    return any(f"{entry}." in f"{module}." for entry in entries)


def _may_be(key: str, config: AdapterConfig, factors: Mapping[str, object]) -> bool:
    """Whether the configuration allows this tensor, which is not a factor of LoRA.

    It allows copies of modules in modules_to_save, trained rows and biases, and copies of the base's embedding.
    """
    if not key.startswith(PREFIX):
        return False
    module = key.removeprefix(PREFIX).rpartition(".")[0]
    if _is_copy(key, config.low_rank.modules_to_save):
        return True
    if key.endswith(TOKEN_ROWS) and config.low_rank.trainable_token_indices:
        return True
    if key.endswith(".bias") and config.low_rank.bias != "none":
        return config.low_rank.bias == "all" or module.removesuffix(".base_layer") in factors
    return key.endswith(BASE_COPY) and module.removesuffix(".base_layer") in factors


def _parameters(config: AdapterConfig, shapes: Mapping[str, Sequence[int]]) -> frozenset[str]:
    """The layers that the configuration lists as parameters (target_parameters).

    Raises: AdapterError if one of them is a fused expert parameter.
    """
    ranks, entries = Resolved(config, "rank_pattern"), config.low_rank.target_parameters
    named = {module for module in shapes if any(f".{module}.weight".endswith(f".{entry}") for entry in entries)}
    of_layers = all(entry.endswith(".weight") for entry in entries)
    if not of_layers or any(shapes[module][0] != ranks.of(module, config.low_rank.r) for module in named):
        what = "adapts fused expert parameters, whose factors contain all experts; PEFT cannot add such adapters"
        raise AdapterError(what, "merge it instead", file=config.file, key="target_parameters")
    return frozenset(named)


def _check_shapes(
    config: AdapterConfig, factors: Mapping[str, Mapping[str, str]], header: Mapping[str, TensorEntry], file: str
) -> None:
    """Raises: AdapterError unless all factors have the rank of their layer, and a floating-point dtype."""
    ranks, wrong = Resolved(config, "rank_pattern"), []
    for module, pair in factors.items():
        a, b, rank = header[pair["A"]], header[pair["B"]], ranks.of(module, config.low_rank.r)
        for entry in (a, b):
            if entry.dtype not in FLOATS:
                expected = " or ".join(NAMES[dtype] for dtype in FLOATS)
                wrong.append(f"the factors of '{module}' have type {NAMES[entry.dtype]}, expected {expected}")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            tied = config.fields.get("ensure_weight_tying") is True
            reason = "; peft ties them to the embedding's factors, so merge this adapter instead" if tied else ""
            wrong.append(f"the factors of '{module}' have shapes {shapes}, which do not have rank {rank}{reason}")
    _raise(wrong, file)


def _raise(wrong: list[str], file: str) -> None:
    if wrong:
        more = [f"and {len(wrong) - SHOWN_PROBLEMS} problems more"] if len(wrong) > SHOWN_PROBLEMS else []
        problems = [Problem(text, "", file) for text in [*wrong[:SHOWN_PROBLEMS], *more]]
        raise AdapterError.of([*problems[:-1], replace(problems[-1], how=REPAIR)])


class Resolved:
    """Looks up the values of rank_pattern or alpha_pattern for a layer. Patterns with different values must not match
    the same layer, because programs would choose different values."""

    def __init__(self, config: AdapterConfig, key: str) -> None:
        self.values: Mapping[str, float] = getattr(config.settings, key)
        self.patterns = Patterns(file=config.file, key=key)

    def of(self, module: str, default: float) -> float:
        """The value for a module.

        Raises: AdapterError if two matching patterns have different values.
        """
        names = (module, f"{module}.weight")  # the second name is that of a layer listed as a parameter
        matching = [p for p in self.values if any(self.patterns.matches_ending(p, name) for name in names)]
        values = {self.values[pattern] for pattern in matching}
        if len(values) > 1:
            what = f"{' and '.join(map(repr, matching[:3]))} match '{module}' with different values"
            raise AdapterError(what, "keep one of them", file=self.patterns.file, key=self.patterns.key)
        return values.pop() if values else default


class Scalings:
    """The scaling s of each layer of a LoRA folder: alpha / r, or alpha / sqrt(r) with rsLoRA."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config, self.settings = config, config.low_rank
        self.ranks, self.alphas = Resolved(config, "rank_pattern"), Resolved(config, "alpha_pattern")

    def of(self, module: str) -> float:
        """The scaling of a module. Raises: AdapterError if earlier releases of PEFT used a different scaling for it."""
        rank = self.ranks.of(module, self.settings.r)
        alpha = self.alphas.of(module, self.settings.alpha)
        refuse_changed_patterns(self.config, {module: (rank, alpha)})
        return alpha / (rank**0.5 if self.settings.use_rslora else rank)
