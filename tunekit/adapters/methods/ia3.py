"""IA3, for linear layers and Conv1D, quantized or not."""

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor, nn

from tunekit.adapters.base import LayerAdapter, PeftConfig, Slot, Slots
from tunekit.adapters.folder.fields import PeftSide, same_names
from tunekit.adapters.folder.targets import entries_for
from tunekit.adapters.method import Conflict, Method, always_linear
from tunekit.adapters.patterns import Patterns
from tunekit.recipe.adapters.ia3 import Ia3Settings
from tunekit.records import Target


class Ia3(LayerAdapter[Ia3Settings]):
    """Scaled outputs, y = l * (W x + b); in the feed-forward block scaled inputs, y = W (l * x) + b.

    Shapes: x (..., I) -> y (..., O); l (O, 1), or (1, I). Starts as the identity: l = 1. The product is computed in
    float32: a scale of 1.003 is 1 in bfloat16. Source: Liu et al. 2022, section 3.3.
    """

    scale: nn.Parameter

    @classmethod
    def slots(cls, settings: Ia3Settings, target: Target) -> Slots:
        inputs = is_feedforward(settings.feedforward_modules, target.name)
        shape = (1, target.in_features) if inputs else (target.out_features, 1)
        return {"scale": Slot("ia3_l", shape, decays=False, first=1.0)}

    def adapted(self, x: Tensor) -> Tensor:
        if self.scale.shape[0] == 1:
            return self.base_output((x * self.scale.flatten()).to(x.dtype))
        y = self.base_output(x)  # (..., O)
        return (y * self.scale.flatten()).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.detach().to(weight.device)
        if bias is not None and scale.shape[0] != 1:
            bias = bias.float() * scale.flatten()
        return weight * scale, bias


@lru_cache(maxsize=65536)
def is_feedforward(entries: str | tuple[str, ...] | None, name: str) -> bool:
    """Whether the layer's inputs are scaled. As in PEFT, entries are endings of the name, or one regular expression for
    the full name."""
    if isinstance(entries, str):
        return Patterns().matches(entries, name)
    return name.endswith(entries or ())


def _conflicts(settings: Ia3Settings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    """Returns a conflict for each entry of feedforward_modules that matches no adapted layer. For a file, shapes are
    checked instead."""
    entries = settings.feedforward_modules
    how = "name layers that are also in target_modules"
    return [
        Conflict("feedforward_modules", f"'{entry}' matches no adapted layer", how)
        for entry in ([entries] if isinstance(entries, str) else entries or ())
        if not file
        and not any(is_feedforward(entry if entry is entries else (entry,), target.name) for target in targets)
    ]


def _resolve(settings: Ia3Settings, targets: Sequence[Target], config: PeftConfig) -> PeftConfig:
    """The value of feedforward_modules in the file. If target_modules is a list, PEFT requires feedforward_modules to
    be entries of that list."""
    inputs = {target.name for target in targets if is_feedforward(settings.feedforward_modules, target.name)}
    return {"feedforward_modules": entries_for(inputs, [t.name for t in targets], config["target_modules"])}


FIXED = {"fan_in_fan_out": (False, True), "init_ia3_weights": (True, False)}
ABSENT = frozenset({"layers_pattern", "layers_to_transform"})
METHOD = Method(
    peft=PeftSide("IA3", Ia3Settings, same_names(feedforward_modules=None), FIXED, absent=ABSENT, resolve=_resolve),
    layer=Ia3,
    tensors=("ia3_l",),
    is_linear=always_linear,
    neutral=1.0,
    conflicts=_conflicts,
)
