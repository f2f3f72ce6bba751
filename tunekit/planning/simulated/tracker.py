"""Tracks the storages of all tensors in a computation, to find the peak of their total size. The tensors can be real or
on the meta device.

A storage counts from the operation that creates it until it is freed. Views do not count again. A storage that is
resized in place counts with its new size.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunekit.machine.devices import kind_of
from tunekit.planning.simulated.kernels import backward_buffers
from tunekit.planning.simulated.outputs import OperationInputs
from tunekit.planning.simulated.values import IntegerValues

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
