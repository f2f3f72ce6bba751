"""Settings of glibc's malloc, through ctypes, that reduce memory fragmentation in training steps on a CPU.

torch requests blocks aligned to 64 bytes from posix_memalign. This leaves a gap of 32 to 80 bytes before each block. If
malloc puts a small object (a graph node, a tensor header) into the gap, the freed block cannot be merged with its
neighbour. Then it is too small for the next block of the same size plus gap. Half of a step's memory was lost in this
way.
Therefore this module reserves many small free chunks, separated by used chunks. malloc puts the small objects there.
"""

import ctypes
import platform
from functools import cache

MMAP_THRESHOLD_BYTES = 32 * 2**20  # malloc's maximum; larger blocks are mapped, and unmapped when freed
TRIM_THRESHOLD_BYTES = 2**31 - 1  # keep the heap's top instead of releasing it and touching it anew in every step
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
STOCK = [(size, 2000) for size in range(32, 129, 16)] + [(16_000, 400)]  # (bytes of a chunk, number of chunks): 7 MB
HEADER_BYTES = 8
# A CPU product of a new shape leaves a compiled kernel in the caches of oneDNN and torch. Without a limit, rows of
# many lengths cost 80 MB per step (measured on a model with 135M parameters). Every command sets this limit.
CACHED_KERNELS = 64


def trim_heap() -> None:
    """Return free heap pages to the system, such as pages of dense weights that were just packed.

    Source: malloc_trim(3).
    """
    library = _library()
    if library is not None:
        library.malloc_trim(0)


@cache
def settle_heap() -> None:
    """Make malloc's thresholds constant (otherwise malloc adapts them), and reserve chunks for small objects. Only the
    first call in a process has an effect."""
    library = _library()
    if library is None:
        return
    library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    take, free = library.malloc, library.free
    take.restype, take.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    stock = []
    for size, count in STOCK:
        for _ in range(count):
            stock.append(take(size - HEADER_BYTES))
            take(1)  # never freed, so that no two chunks of the stock are merged
    for chunk in stock:
        free(chunk)


@cache
def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
