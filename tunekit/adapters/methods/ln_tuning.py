"""LN tuning.  Comes in: the norms of a base, quantized or not.  Next: attach.py, folder.py."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tunekit.adapters.blocks.chosen_modules import chosen_names
from tunekit.adapters.copies import TrainedCopy
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.method import Method
from tunekit.model.quantized.weights import layer_kind
from tunekit.recipe.adapters.ln_tuning import LnTuningSettings


class NormCopy(TrainedCopy):
    """A norm with float32 copies of its weight and bias in their place.

    Shapes: as the norm's.    Starts as the identity: copies equal the originals.    Never decayed.
    Source: Zhao et al. 2023.
    """

    @classmethod
    def file_key(cls, name: str) -> str:
        place, _, own = name.rpartition(".")
        return f"{cls.file_prefix}{place}.ln_tuning_layers.{own}"


def is_norm(module: nn.Module) -> bool:
    """A module without parts of its own, whose parameters are vectors, one of them its weight."""
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters()}
    single = layer_kind(module) is None and not any(True for _ in module.children())
    return single and "weight" in shapes and set(shapes.values()) == {1}


def places(modules: Mapping[str, nn.Module], settings: LnTuningSettings) -> dict[str, None]:
    """The chosen norms, every parameter of each."""
    norms = [name for name, module in modules.items() if is_norm(module)]
    return dict.fromkeys(chosen_names(norms, settings.target_modules, "all-norms", "norm"))


FIELDS = {"target_modules": ("target_modules", None)}
ABSENT = frozenset({"layers_pattern", "layers_to_transform"})
METHOD = Method(peft=PeftSide("LN_TUNING", LnTuningSettings, FIELDS, {}, absent=ABSENT), places=places, copy=NormCopy)
