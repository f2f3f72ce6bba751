"""Real values of small integer and bool tensors in a simulated computation on the meta device, for example for
`.item()`.

Shapes and control flow of a forward depend on ids, positions and masks, never on activations. So only ids, positions
and masks get real values in the simulation. Therefore packed rows have the same mask as in the real run.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from tunekit.planning.simulated.outputs import OperationInputs, meta_output

SIZED_BY_VALUES = (torch.ops.aten.nonzero.default, torch.ops.aten.unique_consecutive.default)
LARGEST_ELEMENTS = 1 << 26  # a mask of 8192 x 8192; values of larger tensors are unknown and read as zero


class IntegerValues:
    """Real copies of integer and bool meta tensors, on the CPU. A copy is called the tensor's twin."""

    def __init__(self) -> None:
        self._twins: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    def run(self, func: OpOverload, args: OperationInputs, kwargs: dict[str, Any]) -> object:
        """Run an operation on the meta device. If the output's size depends on values and these values are known, the
        size is exact."""
        if func in SIZED_BY_VALUES and args[0] in self._twins:
            output = tree_map(_without_values, func(self._twins[args[0]], *args[1:], **kwargs))
        else:
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], [place for index in args[1] for place in self._places(index)])
            output = meta_output(func, args, kwargs)
        self._follow(func, args, kwargs, output)
        return output

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """If `index` is a boolean mask with known values: the indices of the elements that it selects. Otherwise
        `index` itself."""
        mask = None if index is None or index.dtype != torch.bool else self._twins.get(index)
        return [index] if mask is None else [*map(_without_values, mask.nonzero(as_tuple=True))]

    def _follow(self, func: OpOverload, args: OperationInputs, kwargs: dict[str, Any], output: object) -> None:
        """Store the real values of `output`, if it is integer or bool and the values of all inputs are known."""
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not outputs or not all(self._wanted(tensor) for tensor in outputs):
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not all(tensor in self._twins or not tensor.is_meta for tensor in inputs):
            return
        twin = func(*tree_map(self._real, args), **tree_map(self._real, kwargs))
        for tensor, value in zip(
            outputs, (leaf for leaf in tree_leaves(twin) if isinstance(leaf, Tensor)), strict=True
        ):
            self._twins[tensor] = value

    def scalar(self, tensor: Tensor) -> float:
        """The value of a one-element tensor; zero if the value is unknown."""
        twin = self._twins.get(tensor)
        return torch.zeros((), dtype=tensor.dtype).item() if twin is None else twin.item()

    def _wanted(self, tensor: Tensor) -> bool:
        integer = not tensor.is_floating_point() and not tensor.is_complex()
        return tensor.is_meta and integer and tensor.numel() <= LARGEST_ELEMENTS

    def _real(self, leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return self._twins.get(leaf, leaf)
        return torch.device("cpu") if leaf == torch.device("meta") else leaf


def _without_values(tensor: Tensor) -> Tensor:
    return tensor.to("meta")
