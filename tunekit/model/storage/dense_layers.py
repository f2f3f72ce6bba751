"""The dense layers of a sentence-transformers folder, through which pooled vectors pass."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.basics import JsonObject
from tunekit.errors import ModelError
from tunekit.files.durable import write_json
from tunekit.files.tensors import iterate_tensors, read_tensor_header, write_tensors
from tunekit.files.untrusted import MODEL_FILE
from tunekit.model.storage.source import KEY, WEIGHTS, read_json

CONFIG = "config.json"
ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}
PLAIN = {"use_residual": False, "module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


@dataclass(frozen=True)
class DenseLayer:
    """y = activation(W x + b), with frozen weights of the layer's folder. Shapes: x (N, I) -> y (N, O)."""

    folder: Path

    @cached_property
    def config(self) -> JsonObject:
        """The layer's configuration. Raises: ModelError if it has an unknown activation, or other inputs or outputs."""
        config = read_json(self.folder / CONFIG)
        for key, value in PLAIN.items():
            if config.get(key) not in (None, value):
                what = f"the dense layer has {key}: {config[key]}, which tunekit does not read"
                raise ModelError(what, "choose another base", file=str(self.folder / CONFIG), key=KEY)
        if self._name_in(config) not in ACTIVATIONS:
            what = f"the activation {config.get('activation_function')} of the dense layer is unknown"
            how = f"choose a base with one of {', '.join(ACTIVATIONS)}"
            raise ModelError(what, how, file=str(self.folder / CONFIG), key=KEY)
        return config

    @staticmethod
    def _name_in(config: JsonObject) -> str:
        return str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]

    @property
    def facts(self) -> tuple[int, int, str]:
        """The sizes of its input and output, and the name of its activation."""
        return int(self.config["in_features"]), int(self.config["out_features"]), self._name_in(self.config)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """`linear.weight` (O, I) and, if the layer has it, `linear.bias` (O,). Raises: ModelError for other tensors."""
        path, (size, width, _) = self.folder / WEIGHTS, self.facts
        tensors = dict(iterate_tensors(path, read_tensor_header(path, MODEL_FILE), MODEL_FILE))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {
            "linear.weight": (width, size),
            **({"linear.bias": (width,)} if self.config.get("bias", True) else {}),
        }
        if shapes != wanted:
            what = f"the file has the tensors {shapes}, but the layer needs {wanted}"
            raise ModelError(what, "download it again", file=str(path), key=KEY)
        return tensors

    def __call__(self, vectors: Tensor) -> Tensor:
        """Compute the layer's output, with the dtype and on the device of `vectors`."""
        weights = {name: tensor.to(vectors) for name, tensor in self.tensors.items()}
        product = F.linear(vectors, weights["linear.weight"], weights.get("linear.bias"))
        activated: Tensor = ACTIVATIONS[self.facts[2]]()(product)
        return activated

    def save(self, folder: Path) -> None:
        """Write the layer into a new folder, in the schema up to version 5.3."""
        folder.mkdir(exist_ok=True)
        size, width, name = self.facts
        module = "linear" if name == "Identity" else "activation"
        values = {"in_features": size, "out_features": width, "bias": "linear.bias" in self.tensors}
        write_json(folder / CONFIG, {**values, "activation_function": f"torch.nn.modules.{module}.{name}"})
        write_tensors(folder / WEIGHTS, self.tensors)
