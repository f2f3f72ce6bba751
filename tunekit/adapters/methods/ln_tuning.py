"""LN tuning, for the norms of a base, quantized or not."""

from torch import nn

from tunekit.adapters.blocks.chosen_modules import chosen_names
from tunekit.adapters.copies import TrainedCopy
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.method import Method, always_linear
from tunekit.contracts import Modules
from tunekit.model.quantized.weights import layer_kind
from tunekit.recipe.adapters.ln_tuning import LnTuningSettings


class NormCopy(TrainedCopy):
    """A norm whose weight and bias are replaced by trained float32 copies.

    Shapes: those of the norm. Starts as the identity: copies equal the originals. Weight decay never applies. Source:
    Zhao et al. 2023.
    """

    @classmethod
    def file_key(cls, name: str) -> str:
        module_name, _, parameter = name.rpartition(".")
        return f"{cls.file_prefix}{module_name}.ln_tuning_layers.{parameter}"


def is_norm(module: nn.Module) -> bool:
    """Whether the module has no children and only vectors as parameters, including a weight."""
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters()}
    single = layer_kind(module) is None and not any(True for _ in module.children())
    return single and "weight" in shapes and set(shapes.values()) == {1}


def chosen_norms(modules: Modules, settings: LnTuningSettings) -> dict[str, None]:
    """The chosen norms, with all of their parameters."""
    norms = [name for name, module in modules.items() if is_norm(module)]
    return dict.fromkeys(chosen_names(norms, settings.target_modules, "all-norms", "norm"))


METHOD = Method(
    peft=PeftSide("LN_TUNING", LnTuningSettings, absent=frozenset({"layers_pattern", "layers_to_transform"})),
    only_copies=chosen_norms,
    copy=NormCopy,
    tensors=("ln_tuning_layers.weight", "ln_tuning_layers.bias"),
    is_linear=always_linear,
)
