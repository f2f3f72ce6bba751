"""Tracks the storages of all tensors in a computation, to find the peak of their total size. The tensors can be real or
on the meta device.

A storage counts from the operation that creates it until it is freed. Views do not count again. A storage that is
resized in place counts with its new size.

Shapes and control flow of a forward depend on ids, positions and masks, never on activations. So only small integer
and bool tensors get real values in the simulation. Therefore packed rows have the same mask as in the real run.
torch computes the outputs of operations on meta tensors in Python, which takes a quarter of a millisecond each. The
same few hundred operations occur again in each layer, in each step, and for each setting that plan compares. So
outputs are cached by the operation and the shapes, strides and types of its inputs.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from tunekit.machine.devices import kind_of
from tunekit.planning.simulated.kernels import backward_buffers

OperationInputs = tuple[Any, ...]
CUDA_BLOCK_BYTES = 512  # the caching allocators of CUDA and XPU round every allocation up to this


@dataclass(frozen=True)
class Simulation:
    """The peak of live bytes, in total and by part. `offloaded`: bytes of pinned host memory, which are not in the
    peak."""

    peak: dict[str, int]
    total: int
    offloaded: int = 0


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensors by part, and their peak since `start`.

    `device`: the device where the computation will really run. It determines how sizes are rounded and how large kernel
    workspaces are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.part = "activations"
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak: dict[str, int] = {}
        self.peak_total = 0
        self._values = IntegerValues()
        self._known: dict[int, tuple[str, int]] = {}  # storage id -> part, bytes

    def adopt(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that already exist."""
        with self.counting_as(part):
            for tensor in tensors:
                self._follow(tensor)

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """A context manager: memory that is allocated inside the block counts as `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def move(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count existing tensors as `part` from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            old, size = self._known[key]
            self._known[key] = (part, size)
            self.live[old] -= size
            self.live[part] += size

    def pass_through(self, sizes: Iterable[int]) -> None:
        """Count temporary blocks that are allocated together and freed at once."""
        together = sum(self._rounded(size) for size in sizes)
        self._add(self.part, together)
        self._add(self.part, -together)

    def start(self) -> None:
        """Reset the peak to the bytes that are live now."""
        self.peak, self.peak_total = dict(self.live), self.total

    def result(self) -> Simulation:
        """The peak since `start`."""
        return Simulation(dict(self.peak), self.peak_total)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: OperationInputs = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._values.scalar(args[0])
        output = self._values.run(func, args, kwargs or {})
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        self.pass_through(backward_buffers(func._schema.name, args, self.device))
        if func is torch.ops.aten.logsumexp.default:  # makes a temporary exp(x - max(x)): ATen/native/ReduceOps.cpp
            self.pass_through([args[0].nbytes])
        return output

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self._rounded(storage.nbytes())
        known = self._known.get(key)
        if known is None:
            # The finalizer knows a key, not the storage, and does not keep it alive.
            weakref.finalize(storage, self._forget, key).atexit = False
            self._known[key] = (self.part, size)
            self._add(self.part, size)
        elif known[1] != size:
            self._known[key] = (known[0], size)
            self._add(known[0], size - known[1])

    def _forget(self, key: int) -> None:
        part, size = self._known.pop(key)
        self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        self.live[part] += size
        self.total += size
        if self.total > self.peak_total:
            self.peak, self.peak_total = dict(self.live), self.total

    def _rounded(self, size: int) -> int:
        if kind_of(self.device).own_memory:
            return -(-size // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
        return size


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


CACHED_OUTPUTS = 20_000  # some 10 MB
CHANGING = {torch.Tag.inplace_view, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_layouts: dict[tuple[object, ...], list[_Layout] | None] = {}  # None: the output is the first input, changed in place


def meta_output(func: OpOverload, args: OperationInputs, kwargs: dict[str, Any]) -> object:
    """The output of `func(*args, **kwargs)` on meta tensors, from the cache if possible."""
    kind = _kind(func)
    key = (func, *_described(args), *_described(tuple(kwargs.items()))) if kind else (None,)
    if kind is None or None in key:
        return func(*args, **kwargs)
    try:
        known = _layouts.get(key, ())
    except TypeError:  # not hashable
        return func(*args, **kwargs)
    if known is None:
        return args[0]
    if known:
        outputs = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
    if len(_layouts) >= CACHED_OUTPUTS:
        _layouts.clear()
    output = func(*args, **kwargs)
    if kind == "in place":
        if output is args[0]:
            _layouts[key] = None
    elif layouts := _layouts_of(output, (args, kwargs)):
        _layouts[key] = layouts
    return output


@cache
def _kind(func: OpOverload) -> str | None:
    """The kind of an operation: "new" if it makes new tensors, "in place" if it changes its first input; None for
    others, such as views."""
    schema = func._schema
    shared = [place for place, argument in enumerate(schema.arguments) if argument.alias_info is not None]
    if CHANGING & set(func.tags) or any(str(value.type) != "Tensor" for value in schema.returns):
        return None
    if not shared and all(value.alias_info is None for value in schema.returns):
        return "new" if schema.returns else None
    first = schema.arguments[0].alias_info
    changes = first is not None and first.is_write and len(schema.returns) == 1
    return "in place" if shared == [0] and changes else None


def _described(values: tuple[object, ...] | list[object]) -> list[object]:
    """A hashable description of the inputs, from which the output follows. It contains None for an input that is a real
    tensor or has a subclass of Tensor."""
    descriptions: list[object] = []
    for value in values:
        if isinstance(value, Tensor):
            plain = type(value) in (Tensor, nn.Parameter) and value.is_meta and not value.is_complex()
            descriptions.append((value.shape, value.stride(), value.dtype) if plain else None)
        elif isinstance(value, tuple | list):
            inside = _described(value)
            descriptions.append(None if None in inside else tuple(inside))
        else:
            descriptions.append((type(value), value))  # 1 and True and 1.0 are not the same
    return descriptions


def _layouts_of(output: object, inputs: object) -> list[_Layout]:
    """Shape, strides and dtype of each output. Empty if an output shares its storage with another tensor, or does not
    fill its storage."""
    tensors = output if isinstance(output, tuple) else (output,)
    storages = {leaf.untyped_storage()._cdata for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    layouts: list[_Layout] = []
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_meta or tensor.untyped_storage()._cdata in storages:
            return []
        size, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
        same = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        if tensor.storage_offset() or same.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return []
        storages.add(tensor.untyped_storage()._cdata)
        layouts.append((size, stride, dtype))
    return layouts
