"""What glibc's malloc makes of a sequence of allocations: the resident bytes, with everything it keeps for later.

Comes in: the trace of a Simulation.  Goes out: the highest number of resident bytes.  Next: estimate.py.

On a CPU a tensor's memory is malloc's. A block comes from one contiguous heap, by best fit, and a freed one stays
resident: a tenth of a training step's memory, so it is replayed. The rules are those of glibc's malloc.c as malloc.py
has set it: its top is never given back, and what fits nowhere and is large is mapped.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable

from tunekit.machine.malloc import KEPT_KERNELS, MMAP_THRESHOLD_BYTES
from tunekit.planning.simulated.workspace import COMPILED_BLOCKS

PAGE = 4096
ALIGNMENT = 64  # what torch asks posix_memalign for
HEADER, UNIT, LEAST = 8, 16, 32  # SIZE_SZ, MALLOC_ALIGNMENT, MINSIZE
TOP_PAD = 128 * 1024  # M_TOP_PAD


class Heap:
    """The main arena and the mapped blocks. Addresses count from the heap's start."""

    def __init__(self) -> None:
        self.mapped_bytes = 0
        self.top = 0  # where the top chunk begins
        self.end = 0  # the program break
        self.touched = 0  # pages beyond were never written since they were got
        self.peak_bytes = 0
        self._used: dict[object, tuple[int, int]] = {}  # key -> address (-1: mapped), size
        self._free: dict[int, int] = {}  # address -> size
        self._free_ends: dict[int, int] = {}  # end -> address
        self._by_size: list[tuple[int, int, int]] = []  # sorted bins: size, the latest of a size first, address
        self._sorted: dict[int, int] = {}  # address -> its number in the order of sorting
        self._sorted_so_far = 0
        self._kernels: OrderedDict[tuple[float, int], None] = OrderedDict()  # the one used last comes last
        self._unsorted: dict[int, None] = {}  # addresses, oldest first

    @property
    def resident_bytes(self) -> int:
        """Heap pages that were written, and mapped blocks."""
        return self.touched + self.mapped_bytes

    def replay(self, trace: Iterable[tuple[int, int]], run: int = 0, *, shapes: float = 0.0) -> None:
        """Allocate and free as the trace says; `run` tells equal numbers of different runs apart, and `shapes` equal
        kernels of batches of different shapes."""
        for number, size in trace:
            if size > 0:
                self.allocate((run, number), size)
            elif size < 0:
                self.release((run, number))
            else:
                self._use_kernel((shapes, number))

    def _use_kernel(self, kernel: tuple[float, int]) -> None:
        """A compiled kernel's memory stays until so many others have been used since."""
        if kernel in self._kernels:
            self._kernels.move_to_end(kernel)
            return
        self._kernels[kernel] = None
        for index, size in enumerate(COMPILED_BLOCKS):
            self.allocate((kernel, "compiled", index), size)
        if len(self._kernels) > KEPT_KERNELS:
            oldest, _ = self._kernels.popitem(last=False)
            for index in range(len(COMPILED_BLOCKS)):
                self.release((oldest, "compiled", index))

    def allocate(self, key: object, size: int) -> None:
        """posix_memalign(64, size)."""
        if key in self._used:  # a storage resized in place: a new block, then the old one goes
            return
        chunk = -(-(size + HEADER) // UNIT) * UNIT
        self._used[key] = self._take(chunk)
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _take(self, chunk: int) -> tuple[int, int]:
        """A place for `chunk` bytes, aligned; what was taken too much before and behind it is given back."""
        padded = chunk + ALIGNMENT + LEAST + UNIT  # memalign asks malloc, which adds a header of its own
        self._sort(padded)
        index = bisect_left(self._by_size, (padded, -self._sorted_so_far, 0))
        if index < len(self._by_size):
            size, _, address = self._by_size.pop(index)
            self._forget(address, size)
            if size - padded >= LEAST:
                self._give_back(address + padded, size - padded)
                size = padded
        elif self.end - self.top >= padded + LEAST:
            address, size = self.top, padded
            self.top += padded
        elif padded >= MMAP_THRESHOLD_BYTES:
            return self._map(padded)
        else:
            grown = self.top + padded + TOP_PAD + LEAST
            self.end = max(self.end, -(-grown // PAGE) * PAGE)
            address, size = self.top, padded
            self.top += padded
        before = -(address + 2 * HEADER) % ALIGNMENT
        before += ALIGNMENT if 0 < before < LEAST else 0
        if before:
            self._give_back(address, before)
            address, size = address + before, size - before
        if size - chunk > LEAST:
            self._give_back(address + chunk, size - chunk)
            size = chunk
        self.touched = max(self.touched, address + chunk)
        return address, size

    def _map(self, padded: int) -> tuple[int, int]:
        mapped = -(-(padded + HEADER) // PAGE) * PAGE
        self.mapped_bytes += mapped
        return -1, mapped

    def _sort(self, wanted: int) -> None:
        """Move the unsorted chunks into the bins, but stop at one of just the size that is wanted."""
        while self._unsorted:
            address = next(iter(self._unsorted))
            del self._unsorted[address]
            self._sorted_so_far += 1
            self._sorted[address] = self._sorted_so_far
            insort(self._by_size, (self._free[address], -self._sorted_so_far, address))
            if self._free[address] == wanted:
                return

    def _forget(self, address: int, size: int) -> None:
        del self._free[address]
        del self._free_ends[address + size]
        self._sorted.pop(address, None)

    def release(self, key: object) -> None:
        """free()."""
        found = self._used.pop(key, None)
        if found is None:
            return
        address, size = found
        if address >= 0:
            self._give_back(address, size)
            return
        self.mapped_bytes -= size

    def _give_back(self, address: int, size: int) -> None:
        """Join a chunk with its free neighbours; at the top, with the top."""
        before = self._free_ends.get(address)
        if before is not None:
            length = self._free[before]
            self._drop(before, length)
            address, size = before, size + length
        if address + size == self.top:
            self.top = address
        else:
            after = self._free.get(address + size)
            if after is not None:
                self._drop(address + size, after)
                size += after
            self._free[address], self._free_ends[address + size] = size, address
            self._unsorted[address] = None

    def _drop(self, address: int, size: int) -> None:
        number = self._sorted.get(address)
        self._forget(address, size)
        if number is None:
            del self._unsorted[address]
        else:
            del self._by_size[bisect_left(self._by_size, (size, -number, address))]
