"""The LoRA of a given rank that is nearest to an adapter of any method that changes weights.

One matrix of the base is in memory at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.config import AdapterConfig
from tunekit.adapters.folder.targets import concrete_targets
from tunekit.adapters.module_names import base_modules
from tunekit.arithmetic.lora_folder import PREFIX, LoraFolder, plain_lora_method
from tunekit.arithmetic.low_rank import LowRank, decompose, weighted_sum
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError
from tunekit.recipe.bases.low_rank import LowRankSettings

BaseLayer = Callable[[str], tuple[Tensor, Tensor | None]]  # module name -> matrix (O, I) and bias (O,), float32
SAME = 1e-6  # a bias that differs by less than this share of itself was only rounded


@dataclass(frozen=True)
class RankLoss:
    """One layer's update D against its LoRA L: |D|, |D - L|."""

    name: str
    norm: float
    error: float

    @property
    def share(self) -> float:
        """|D - L| / |D|."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def kept(self) -> float:
        """The part of |D|^2 that L holds."""
        return 1.0 - self.share**2


def layer_change(
    attached: AttachedAdapter, name: str, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One layer's update (O, I), float32 (of an embedding (D, V)), and its new bias (O,)."""
    layer = attached.layers[name]
    changed, new_bias = layer.merged(weight, bias)
    delta = (changed - weight).t() if layer.target.kind == "embedding" else changed - weight
    return delta.detach(), None if new_bias is None else new_bias.detach()


def nearest_lora(
    attached: AttachedAdapter, config: AdapterConfig, base_layer: BaseLayer, rank: int
) -> tuple[LoraFolder, dict[str, RankLoss]]:
    """The LoRA of that rank for every layer, and what each loses; trained copies, rows and biases are handed on.

    Raises: AdapterError for methods that change something other than the weights of layers.
    """
    if attached.model_adapter is not None:
        raise AdapterError("a prompt is no change of weights, and no LoRA does the same", "use it as an adapter")
    if attached.parameters or not attached.layers:
        what = "expert parameters" if attached.parameters else "copies of whole modules, and no layer"
        raise AdapterError(f"the adapter changes {what}, which LoRA of layers cannot", "merge it instead")
    updates: dict[str, LowRank] = {}
    losses: dict[str, RankLoss] = {}
    biases: Tensors = {}
    moved = False
    for name, layer in attached.layers.items():
        weight, bias = base_layer(name)
        delta, new_bias = layer_change(attached, name, weight, bias)
        embedding = layer.target.kind == "embedding"
        updates[name], losses[name] = nearest_update(name, delta, rank, embedding)
        if new_bias is not None and bias is not None:
            moved = moved or not bool((new_bias - bias).norm() <= SAME * bias.norm())
        if new_bias is not None and not embedding:
            biases[f"{PREFIX}{name}.base_layer.bias"] = new_bias
    other_tensors = trained_beside(attached)
    settings = lora_settings(attached.settings, moved)
    other_tensors |= biases if settings.bias != "none" else {}
    targets = concrete_targets(list(updates), list(base_modules(attached.net)))
    conv1d = any(target.kind == "conv1d" for target in attached.targets)
    config = replace(config, method=plain_lora_method(), settings=settings)
    return LoraFolder(config, updates, other_tensors, targets, conv1d), losses


def trained_beside(attached: AttachedAdapter) -> Tensors:
    """Trained copies and rows, by file key."""
    parts = [*attached.copies.values(), *attached.tokens.values()]
    return {part.file_key(name): tensor.detach() for part in parts for name, tensor in part.state().items()}


def lora_settings(settings: object, moves_bias: bool) -> LowRankSettings:
    """LoRA's settings with whatever of the method's own says what else is trained."""
    names = ("modules_to_save", "trainable_token_indices", "bias")
    values = {key: getattr(settings, key) for key in names if hasattr(settings, key)}
    if moves_bias and values.get("bias", "none") == "none":
        values["bias"] = "lora_only"
    plain: LowRankSettings = plain_lora_method().peft.settings()
    return plain.model_copy(update=values)


def nearest_update(name: str, delta: Tensor, rank: int, embedding: bool) -> tuple[LowRank, RankLoss]:
    """The update L of that rank that is nearest to D, and |D| and |D - L|, measured on the matrices themselves."""
    update = decompose(delta, rank, embedding=embedding)
    norm, error = (
        float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in (delta, delta - update.dense())
    )
    return update, RankLoss(name, norm, error)


def loss_between(name: str, update: LowRank, lower: LowRank) -> RankLoss:
    """The same of an update that has factors itself."""
    return RankLoss(name, update.norm(), weighted_sum([update, lower], [1.0, -1.0]).norm())


def total(losses: Mapping[str, RankLoss]) -> RankLoss:
    """All layers as one."""
    norm = sum(loss.norm**2 for loss in losses.values()) ** 0.5
    return RankLoss("all layers", norm, sum(loss.error**2 for loss in losses.values()) ** 0.5)
