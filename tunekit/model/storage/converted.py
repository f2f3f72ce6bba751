"""Parameters that a checkpoint stores in pieces: a mixture's experts one by one, where the net has them fused.

Which piece belongs where is asked of transformers, whose loading joins them.
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
    """Names in the files of parameters that transformers renames while it loads -> their names in the net."""
    whole = {name: torch.empty(tensor.shape, device="meta") for name, tensor in net.state_dict().items()}
    own = {id(tensor): name for name, tensor in whole.items()}
    stored = revert_weight_conversion(net, whole).items()
    return {name: own[id(tensor)] for name, tensor in stored if own.get(id(tensor), name) != name}


class StoredPieces:
    """One parameter of the net and its pieces in the files; `names` is empty where the files have no such pieces."""

    def __init__(self, net: nn.Module, parameter: str, stored: Collection[str]) -> None:
        self.net, self.parameter = net, parameter
        self.shape = net.get_parameter(parameter).shape
        pieces = self.split(torch.empty(self.shape, device="meta"))
        sizes = sum(piece.numel() for piece in pieces.values())
        fits = all(name in stored for name in pieces) and sizes == math.prod(self.shape)
        self.names = sorted(pieces) if fits else []

    def split(self, whole: Tensor) -> Tensors:
        """The pieces by their names in the files."""
        return revert_weight_conversion(self.net, {self.parameter: whole})

    def places(self, whole: Tensor) -> Tensors | None:
        """Views into `whole` to read the pieces into; None where a piece is no contiguous part of it."""
        with _NoCopies():
            parts = self.split(whole)
        root = whole if whole._base is None else whole._base
        return parts if all(part is whole or part._base is root for part in parts.values()) else None

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter in float32, from pieces that `read` gives by name."""
        whole = torch.empty(math.prod(self.shape))
        places = self.split(torch.arange(whole.numel(), dtype=torch.int32).reshape(self.shape))
        for name, place in places.items():
            whole[place.flatten().long()] = read(name).flatten().float()
        return whole.reshape(self.shape)


class _NoCopies(TorchFunctionMode):
    """Inside the block a tensor is taken for contiguous, so that a split gives views."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))
