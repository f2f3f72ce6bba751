"""Parameters that transformers fuses from several tensors of a checkpoint (pieces), such as the experts of a mixture.

The position of each piece in the fused parameter is derived from transformers' own conversion code.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion

from tunekit.contracts import Tensors


def stored_names(net: nn.Module) -> dict[str, str]:
    """A mapping from the names in the files to the names in the net, for parameters that transformers renames."""
    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in net.state_dict().items()}
    names = {id(tensor): name for name, tensor in tensors.items()}
    stored = revert_weight_conversion(net, tensors).items()
    return {name: names[id(tensor)] for name, tensor in stored if names.get(id(tensor), name) != name}


class StoredPieces:
    """A fused parameter of the net and its pieces. `names`: the names of the pieces in the files; empty if the files do
    not contain all pieces."""

    def __init__(self, net: nn.Module, parameter: str, stored: Collection[str]) -> None:
        self.net, self.parameter = net, parameter
        self.shape = net.get_parameter(parameter).shape
        pieces = self.split(torch.empty(self.shape, device="meta"))
        sizes = sum(piece.numel() for piece in pieces.values())
        fits = all(name in stored for name in pieces) and sizes == math.prod(self.shape)
        self.names = sorted(pieces) if fits else []

    def split(self, parameter: Tensor) -> Tensors:
        """Split a fused parameter into its pieces. Returns the pieces by their names in the files."""
        return revert_weight_conversion(self.net, {self.parameter: parameter})

    def matrices(self) -> dict[str, tuple[int, Tensor, Tensor]] | None:
        """For each piece, a matrix (O, I) of one expert: the number of the expert, and the rows (O,) and columns (I,)
        of the piece in the fused parameter (E, P, Q). None if a piece is not such a matrix."""
        count, rows, columns = self.shape
        # at each place of the parameter: the number of the row, and the number of the column
        row_of = torch.arange(count * rows).reshape(count, rows, 1).expand(count, rows, columns)
        column_of = torch.arange(columns).expand(count, rows, columns)
        columns_of = self.views(column_of) or self.split(column_of)
        pieces = self.views(row_of) or self.split(row_of)
        if any(places.dim() != 2 or bool((places[0] != places[0, 0]).any()) for places in pieces.values()):
            return None
        return {
            name: (int(places[0, 0]) // rows, places[:, 0] % rows, columns_of[name][0])
            for name, places in pieces.items()
        }

    def views(self, parameter: Tensor) -> Tensors | None:
        """The pieces as views of `parameter`, so that each can be read into its place. None if a piece is not a
        contiguous part of `parameter`."""
        with _NoCopies():
            parts = self.split(parameter)
        root = parameter if parameter._base is None else parameter._base
        return parts if all(part is parameter or part._base is root for part in parts.values()) else None

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Fuse the pieces, which `read` returns by name, to the parameter in float32."""
        joined = torch.empty(math.prod(self.shape))
        places = self.split(torch.arange(joined.numel(), dtype=torch.int32).reshape(self.shape))
        for name, place in places.items():
            joined[place.flatten().long()] = read(name).flatten().float()
        return joined.reshape(self.shape)


class _NoCopies(TorchFunctionMode):
    """Context manager: `Tensor.contiguous` does not copy, so that splitting a parameter returns views."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))
