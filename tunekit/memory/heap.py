"""What glibc's malloc makes of a sequence of allocations: the resident bytes, with everything it keeps for later.

Comes in: the trace of a Simulation.  Goes out: the highest number of resident bytes.  Next: estimate.py.

On a CPU a tensor's memory is malloc's. A block under the mmap threshold comes from one contiguous heap, by best fit,
and a freed one stays resident: up to a quarter of a training step's memory, so it is replayed. The constants are
those of glibc's malloc.c; none is fitted.

The process has more in its heap than tensors: small objects and compiled kernels that stay, scattered. So the heap's
top is never free enough to be given back, and no free stretch is as long as the largest blocks, which are mapped.
These two simplifications were chosen after rows of `scripts/bench estimate` had missed, so those rows (seed 0) are no
independent check of them: judge with another --seed.
"""

from __future__ import annotations

import ctypes
import platform
from bisect import bisect_left, insort
from collections.abc import Iterable

PAGE = 4096
ALIGNMENT = 64  # what torch asks posix_memalign for
HEADER, UNIT, LEAST = 8, 16, 32  # SIZE_SZ, MALLOC_ALIGNMENT, MINSIZE
TOP_PAD = 128 * 1024  # M_TOP_PAD
FIRST_THRESHOLD = 128 * 1024  # M_MMAP_THRESHOLD, which grows with each mapped block that is freed
LARGEST_THRESHOLD = 32 * 2**20  # up to here


class Heap:
    """The main arena and the mapped blocks. Addresses count from the heap's start."""

    def __init__(self, mmap_threshold: int = FIRST_THRESHOLD) -> None:
        self.mmap_threshold = mmap_threshold
        self.mapped_bytes = 0
        self.top = 0  # where the top chunk begins
        self.end = 0  # the program break
        self.touched = 0  # pages beyond were never written since they were got
        self.peak_bytes = 0
        self._used: dict[object, tuple[int, int]] = {}  # key -> address (-1: mapped), size
        self._free: dict[int, int] = {}  # address -> size
        self._free_ends: dict[int, int] = {}  # end -> address
        self._by_size: list[tuple[int, int]] = []  # sorted bins
        self._unsorted: dict[int, None] = {}  # addresses, oldest first

    @property
    def resident_bytes(self) -> int:
        """Heap pages that were written, and mapped blocks."""
        return self.touched + self.mapped_bytes

    def replay(self, trace: Iterable[tuple[int, int]], run: int = 0) -> None:
        """Allocate and free as the trace says; `run` tells equal numbers of different runs apart."""
        for number, size in trace:
            if size > 0:
                self.allocate((run, number), size)
            else:
                self.release((run, number))

    def allocate(self, key: object, size: int) -> None:
        """posix_memalign(64, size)."""
        if key in self._used:  # a storage resized in place: a new block, then the old one goes
            return
        chunk = -(-(size + HEADER) // UNIT) * UNIT
        self._used[key] = self._take(chunk, chunk + ALIGNMENT + LEAST)
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _take(self, chunk: int, padded: int) -> tuple[int, int]:
        """A place for `chunk` bytes, found as for `padded` ones, with what is too much given back."""
        if padded > LARGEST_THRESHOLD:
            return self._map(padded)
        self._sort(padded)
        index = bisect_left(self._by_size, (padded, 0))
        if index < len(self._by_size):
            size, address = self._by_size[index]
            del self._by_size[index]
            self._forget(address, size)
        elif self.end - self.top >= padded + LEAST:
            address, size = self.top, padded
            self.top += padded
        elif padded >= self.mmap_threshold:
            return self._map(padded)
        else:
            grown = self.top + padded + TOP_PAD + LEAST
            self.end = max(self.end, -(-grown // PAGE) * PAGE)
            address, size = self.top, padded
            self.top += padded
        self.touched = max(self.touched, address + chunk)
        if size - chunk >= LEAST:
            self._give_back(address + chunk, size - chunk)
            size = chunk
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
            insort(self._by_size, (self._free[address], address))
            if self._free[address] == wanted:
                return

    def _forget(self, address: int, size: int) -> None:
        del self._free[address]
        del self._free_ends[address + size]

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
        if self.mmap_threshold < size <= LARGEST_THRESHOLD:
            self.mmap_threshold = size

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
        self._forget(address, size)
        if address in self._unsorted:
            del self._unsorted[address]
            return
        index = bisect_left(self._by_size, (size, address))
        if index < len(self._by_size) and self._by_size[index] == (size, address):
            del self._by_size[index]


def trim_heap() -> None:
    """Give the free pages of this process's heap back to the system.

    The adapter's tensors are made one by one and then moved into one buffer. What they leave lies between small
    objects that stay, in pieces that no activation fits into.    Source: malloc_trim(3).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
