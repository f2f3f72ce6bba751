"""glibc's malloc, set through ctypes so that a training step on a CPU wastes little.

torch asks posix_memalign for blocks at 64 bytes: of each free chunk a splinter of 32 to 80 bytes is left before the
block. A small object (the node of a graph, a tensor's head) that moves in there keeps the block, once it is freed, from
joining its neighbour, and alone it is too small for the next block of its own size, with its splinter. Half of a
step's memory was lost so. A stock of small free chunks, each between two used ones, takes these objects in instead.
"""

import ctypes
import platform
from functools import cache

MMAP_THRESHOLD_BYTES = 32 * 2**20  # the largest that malloc allows; blocks from here on are mapped and given back
TRIM_THRESHOLD_BYTES = 2**31 - 1  # the heap's top stays, instead of being given back and touched anew in every step
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
STOCK = [(size, 2000) for size in range(32, 129, 16)] + [(16_000, 400)]  # (bytes of a chunk, how many): 7 MB
HEADER_BYTES = 8
# A CPU product of a new shape leaves its compiled kernel behind, in oneDNN and in torch: without a limit, rows of many
# lengths cost 80 MB a step (measured on a model of 135M parameters). cli.py sets it for every run.
KEPT_KERNELS = 64


def trim_heap() -> None:
    """Give the free pages of this process's heap back to the system: those of small dense weights that were just
    packed, and of whatever else loading freed.    Source: malloc_trim(3)."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


@cache
def settle_heap() -> None:
    """Fix the thresholds, which else follow the blocks that are freed, and lay in the stock; once for a process."""
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
            take(1)  # stays, so that no two chunks of the stock are joined
    for chunk in stock:
        free(chunk)


@cache
def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
