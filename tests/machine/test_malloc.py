"""The process's heap: its rules are malloc's own, and small objects do not keep freed blocks apart."""

from __future__ import annotations

import ctypes
import json
import platform
import random
import subprocess
import sys

import pytest

from tunekit.machine.malloc import settle_heap, trim_heap
from tunekit.planning.simulated.heap import Heap

MIB = 2**20
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replays glibc's malloc")

# Real blocks, whose pages nobody touches: the arena's size and the mapped bytes after each operation's peak.
REAL = """
import ctypes, json, random, sys
from tunekit.machine.malloc import settle_heap
blocks, small, settled = json.loads(sys.argv[1])
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc.mallinfo2.restype = Info
libc.memalign.restype, libc.memalign.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
if settled:
    settle_heap()
held = lambda: (lambda info: info.arena + info.hblkhd)(libc.mallinfo2())
before, peak, live, draw = held(), 0, {}, random.Random(1)
for number, size in blocks:
    if size > 0:
        live[number] = libc.memalign(64, size)
        for _ in range(small):
            libc.malloc(draw.choice([24, 40, 56, 72]))
        peak = max(peak, held() - before)
    else:
        libc.free(live.pop(number))
print(peak)
"""


def real_peak_bytes(blocks: list[tuple[int, int]], small: int = 0, settled: bool = True) -> int:
    """What the heap of a fresh process grows to; `small`: objects that stay, made after each block."""
    argument = json.dumps([blocks, small, settled])
    done = subprocess.run([sys.executable, "-c", REAL, argument], capture_output=True, text=True, check=True)
    return int(done.stdout)


def layers(count: int, temporaries: int, draw: random.Random) -> list[tuple[int, int]]:
    """A forward of layers: each makes temporaries, keeps one block and frees the others."""
    blocks: list[tuple[int, int]] = []
    for layer in range(count):
        numbers = [layer * temporaries + index for index in range(temporaries)]
        sizes = [4 * MIB + draw.choice([0, 64, 4096]) for _ in numbers]
        blocks += [(number + 1, size) for number, size in zip(numbers, sizes, strict=True)]
        kept = draw.randrange(temporaries)
        blocks += [(number + 1, -size) for number, size in zip(numbers, sizes, strict=True) if number != numbers[kept]]
    return blocks


@pytest.mark.parametrize("seed", range(4))
def test_the_replay_is_what_malloc_does(seed: int) -> None:
    draw, live, blocks = random.Random(seed), {}, []
    for number in range(400):
        size = draw.choice([80_000, 700_000, 4 * MIB, 11 * MIB, 40 * MIB]) + 64 * draw.randrange(50)
        live[number] = size
        blocks.append((number, size))
        while len(live) > 25 or (live and draw.random() < 0.4):
            freed = draw.choice(list(live))
            blocks.append((freed, -live.pop(freed)))
    heap, peak = Heap(), 0
    for number, size in blocks:
        heap.replay([(number, size)])
        peak = max(peak, heap.end + heap.mapped_bytes)
    assert peak == pytest.approx(real_peak_bytes(blocks), rel=0.1), "ties are broken by where a heap begins"


def test_a_freed_block_alone_is_too_small_for_the_next_of_its_size() -> None:
    size, heap = 4 * MIB, Heap()
    blocks = [(number, size) for number in range(8)]
    again = [*blocks, (4, -size), (8, size)]
    heap.replay(again)
    assert heap.end == pytest.approx(9 * size, rel=0.05)
    assert real_peak_bytes(again) - real_peak_bytes(blocks) == pytest.approx(size, rel=0.05)


def test_small_objects_do_not_keep_freed_blocks_apart() -> None:
    blocks = layers(12, 8, random.Random(0))
    bare, stocked = real_peak_bytes(blocks, small=30, settled=False), real_peak_bytes(blocks, small=30)
    alone = real_peak_bytes(blocks)
    assert stocked < 1.1 * alone
    assert bare > 1.3 * alone, "else malloc no longer needs the stock, and malloc.py is to go"


def test_a_settled_heap_keeps_its_top() -> None:
    settle_heap()
    take, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
    take.restype, take.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    blocks = [take(8 * MIB) for _ in range(20)]
    for block in reversed(blocks):
        free(block)
    again = [take(8 * MIB) for _ in range(20)]
    assert sorted(again) == sorted(blocks)
    for block in again:
        free(block)
    trim_heap()
