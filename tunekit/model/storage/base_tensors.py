"""The tensors of a base, by the names of the net's parameters. They are read from the base's files, or from a net in
memory."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tunekit.contracts import Tensors
from tunekit.model.storage.converted import stored_names
from tunekit.model.storage.quantized_files import QuantizedFiles
from tunekit.model.storage.quantized_layouts import open_weights


class BaseTensors:
    """The tensors in the base's files, by the names of the net's parameters, read one at a time.

    The names in a file can lack the base model's prefix, or come from an older version of transformers. A tensor that
    is not a parameter of the net keeps its name.
    """

    def __init__(self, folder: Path, net: nn.Module) -> None:
        self.stored, renamed = open_weights(folder), stored_names(net)
        parameters, prefix = frozenset(net.state_dict()), str(getattr(net, "base_model_prefix", ""))
        self.files: dict[str, str] = {}  # net's name -> name in the file
        for name in self.stored.headers:
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            net_name = next((candidate for candidate in candidates if candidate in parameters), renamed.get(name, name))
            self.files[net_name] = name
        self.older = {new: old for new, old in self.files.items() if renamed.get(old) == new}
        entries = {new: self.stored.headers[old] for new, old in self.files.items()}
        # name -> meta tensor with the shape and dtype to write
        self.meta = {
            name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor in new memory. A quantized weight is not rounded, but in float32."""
        stored = self.files[name]
        quantized = isinstance(self.stored, QuantizedFiles) and stored in self.stored.weights
        tensor = torch.empty(self.meta[name].shape, dtype=torch.float32 if quantized else self.meta[name].dtype)
        self.stored.read_into(stored, tensor)
        return tensor


class LoadedTensors:
    """Like BaseTensors, but the tensors come from a net in memory, for a base whose files do not match the net, such as
    GGUF. `dtype`: the dtype to write."""

    def __init__(self, net: nn.Module, tied_head: str | None, dtype: torch.dtype) -> None:
        stored: Tensors = dict(net.state_dict(keep_vars=True))
        stored.pop(f"{tied_head}.weight", None)
        once = {id(tensor): name for name, tensor in reversed(stored.items())}  # tied tensors keep their first name
        self.tensors = {name: tensor.detach() for name, tensor in stored.items() if once[id(tensor)] == name}
        self.meta = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        self.meta |= {name: tensor.to(dtype) for name, tensor in self.meta.items() if tensor.is_floating_point()}
        self.older: dict[str, str] = {}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]
