"""Converts an adapter of any method that changes weights to an equal LoRA, or to the nearest LoRA of a given rank.

Only one matrix of the base is in memory at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.config import AdapterConfig
from tunekit.adapters.folder.targets import concrete_targets
from tunekit.adapters.module_names import all_modules
from tunekit.arithmetic.lora_folder import PREFIX, LoraFolder, plain_lora_method
from tunekit.arithmetic.low_rank import LowRank, decompose, reduce_rank, weighted_sum
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError, InputError
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.records import with_article

BaseLayer = Callable[[str], tuple[Tensor, Tensor | None]]  # module name -> matrix (O, I) and bias (O,), float32
SAME = 1e-6  # a smaller relative change of a bias is rounding
HOW = "merge it, or write the nearest LoRA of rank R, and see its error: tunekit adapter convert --rank R"


class NotLowRank(InputError):
    """Raised if an adapter has no exact low-rank form. The adapter can still be merged."""


@dataclass(frozen=True)
class RankLoss:
    """The error of a LoRA L that replaces a layer's update D. `norm`: |D|; `error`: |D - L|."""

    name: str
    norm: float
    error: float

    @property
    def share(self) -> float:
        """The relative error |D - L| / |D|."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def kept(self) -> float:
        """The share of |D|^2 that remains in L."""
        return 1.0 - self.share**2


def layer_change(
    attached: AttachedAdapter, name: str, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The update of one layer in float32, (O, I), or (D, V) for an embedding; and the layer's new bias (O,)."""
    layer = attached.layers[name]
    changed, new_bias = layer.merged(weight, bias)
    delta = (changed - weight).t() if layer.target.kind == "embedding" else changed - weight
    return delta.detach(), None if new_bias is None else new_bias.detach()


def nearest_lora(
    attached: AttachedAdapter, config: AdapterConfig, base_layer: BaseLayer, rank: int | None
) -> tuple[LoraFolder, dict[str, RankLoss]]:
    """The LoRA that computes the same as the adapter or, with `rank`, the nearest LoRA of this rank; and the error of
    each layer. Trained copies, rows and biases are copied.

    Raises: NotLowRank if `rank` is None and the method has no low-rank form; AdapterError for methods that change
    something other than the weights of layers.
    """
    if attached.model_adapter is not None:
        raise AdapterError(
            "a prompt adapter does not change weights, so it has no nearest LoRA", "use it without conversion"
        )
    if attached.parameters or not attached.layers:
        what = "fused expert parameters" if attached.parameters else "only whole modules"
        raise AdapterError(f"the adapter changes {what}, but a LoRA only changes layers", "merge it instead")
    if attached.added_rows:
        what = f"the adapter adds rows to {' and '.join(sorted(attached.added_rows))}, and the nearest LoRA lacks them"
        raise AdapterError(what, "merge it instead", file=config.file)
    updates, losses, other_tensors, moved = layer_updates(attached, config, base_layer, rank)
    settings = lora_settings(attached.settings, moved)
    targets = concrete_targets(list(updates), list(all_modules(attached.net)))
    conv1d = any(target.kind == "conv1d" for target in attached.targets)
    config = replace(config, method=plain_lora_method(), settings=settings)
    return LoraFolder(config, updates, other_tensors, targets, conv1d), losses


@torch.no_grad()
def layer_updates(
    attached: AttachedAdapter, config: AdapterConfig, base_layer: BaseLayer, rank: int | None
) -> tuple[dict[str, LowRank], dict[str, RankLoss], Tensors, bool]:
    """Returns the update of each layer, the error of each update, all other trained tensors by file key, and whether
    the adapter changes biases. (Rotating a layer's outputs, for example, also changes its bias.)

    Raises: NotLowRank if `rank` is None and the method has no low-rank form.
    """
    updates: dict[str, LowRank] = {}
    losses: dict[str, RankLoss] = {}
    biases: Tensors = {}
    moved = False
    for name, layer in attached.layers.items():
        embedding, new_bias, bias = layer.target.kind == "embedding", None, None
        factors = layer.low_rank(lambda name=name: base_layer(name)[0])  # type: ignore[misc]
        if factors is None and rank is None:
            raise NotLowRank(
                f"{with_article(config.settings.method)} adapter cannot be converted to LoRA exactly",
                HOW,
                file=config.file,
            )
        if factors is None or any(key.endswith("bias") for key in layer.state()):
            weight, bias = base_layer(name)
            delta, new_bias = layer_change(attached, name, weight, bias)
        if factors is not None:
            a, b = (factor.float().contiguous() for factor in factors)
            exact = LowRank(a, b, 1.0, embedding)
            updates[name] = exact if rank is None or rank >= exact.rank else reduce_rank(exact, rank)
            losses[name] = loss_between(name, exact, updates[name])
        else:
            updates[name], losses[name] = nearest_update(name, delta, rank or 0, embedding)
        if new_bias is not None:
            moved = moved or bias is None or not bool((new_bias - bias).norm() <= SAME * bias.norm())
        if new_bias is not None and not embedding:
            biases[f"{PREFIX}{name}.base_layer.bias"] = new_bias
    trains_biases = moved or getattr(attached.settings, "bias", "none") != "none"
    return updates, losses, trained_beside(attached) | (biases if trains_biases else {}), moved


def trained_beside(attached: AttachedAdapter) -> Tensors:
    """The trained copies and token rows of an adapter, by file key."""
    parts = [*attached.copies.values(), *attached.tokens.values()]
    return {part.file_key(name): tensor.detach() for part in parts for name, tensor in part.state().items()}


def lora_settings(settings: object, moves_bias: bool) -> LowRankSettings:
    """LoRA settings that keep the adapter's settings for trained copies, token rows and biases."""
    names = ("modules_to_save", "trainable_token_indices", "bias")
    values = {key: getattr(settings, key) for key in names if hasattr(settings, key)}
    if moves_bias and values.get("bias", "none") == "none":
        values["bias"] = "lora_only"
    plain: LowRankSettings = plain_lora_method().peft.settings()
    return plain.model_copy(update=values)


def nearest_update(name: str, delta: Tensor, rank: int, embedding: bool) -> tuple[LowRank, RankLoss]:
    """The update L of rank `rank` that is nearest to the matrix D (`delta`), and its error."""
    update = decompose(delta, rank, embedding=embedding)
    norm, error = (
        float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in (delta, delta - update.dense())
    )
    return update, RankLoss(name, norm, error)


def loss_between(name: str, update: LowRank, lower: LowRank) -> RankLoss:
    """The error if `lower` replaces `update`. Both are low-rank updates."""
    return RankLoss(name, update.norm(), weighted_sum([update, lower], [1.0, -1.0]).norm())


def total(losses: Mapping[str, RankLoss]) -> RankLoss:
    """The error over all layers, as if their updates were one vector."""
    norm = sum(loss.norm**2 for loss in losses.values()) ** 0.5
    return RankLoss("all layers", norm, sum(loss.error**2 for loss in losses.values()) ** 0.5)
