"""The unquantized matrices of a quantized base, for initialisations such as LoftQ."""

from collections.abc import Callable

from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.errors import ModelError
from tunekit.model.quantized.weights import packed_layers
from tunekit.model.storage.rewrite import Rewriter
from tunekit.recipe.model import ModelSection


def originals(adapter: AttachedAdapter, model: ModelSection) -> Callable[[str], Tensor | None]:
    """Returns a function that reads a layer's unquantized matrix (O, I) from the base's files, by the layer's name."""
    rewriter = Rewriter(model, "full")
    packed = {name for name, layer in adapter.layers.items() if packed_layers(layer.base_layer)}

    def read(name: str) -> Tensor | None:
        if name not in packed:  # an unpacked matrix has no quantization error to compensate
            return None
        try:
            return rewriter.base_weight(name).float()
        except KeyError as error:
            what = f"loftq needs the unquantized weight of '{name}', but the base's files do not contain it"
            raise ModelError(what, "choose another adapter.start", key="adapter.start") from error

    return read
