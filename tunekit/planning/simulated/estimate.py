"""From simulated work to the peak of a run, by part.

Comes in: Simulations of the longest batches, what loading the base takes.  Goes out: PeakBytes.  Next: plan.py.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tunekit.planning.simulated.heap import ALIGNMENT, Heap
from tunekit.planning.simulated.tracker import Simulation
from tunekit.records import PeakBytes

SETTLING_PASSES = 3  # after so many micro-batches a heap no longer grows
EVALUATION = -1  # its number among them
LEAST_SCALED_BYTES = 4096  # smaller blocks belong to the adapter more often than to the tokens
# What a run on a CPU keeps resident beside tensors and compiled kernels: code of libraries at its first use, modules.
# The median of `scripts/bench process` (6 runs: 54 to 58 MB), none of which `scripts/bench estimate` judges.
PROCESS_BYTES = 57_000_000
PARTS = ("weights", "adapter", "optimizer", "activations", "logits")


@dataclass(frozen=True)
class Work:
    """What a run does, in order: the longest training step, then an evaluation and the cache of generated answers."""

    step: Simulation
    evaluation: Simulation | None = None
    cache_blocks: Sequence[int] = ()  # bytes of each key and each value tensor
    load_bytes: int = 0  # the most that loading the base takes
    before: Sequence[float] = (1.0, 1.0)  # the run's first micro-batches, as shares of the longest in tokens

    def live(self) -> Simulation:
        """The part with the highest sum of live bytes."""
        found = [self.step] if self.evaluation is None else [self.step, self.evaluation]
        return max(found, key=lambda simulation: simulation.total)


def peak_bytes(work: Work, device: torch.device) -> PeakBytes:
    """Parts are what is live at the highest moment of a step or an evaluation; `total` is the peak of the run.

    On a GPU that is their sum. On the host it is what the process has resident: with what malloc keeps of freed
    blocks, and with the loading of the base, where that takes more; and what the process itself adds.
    """
    highest = work.live()
    parts = {name: highest.peak.get(name, 0) for name in PARTS}
    cache = sum(work.cache_blocks)
    if device.type != "cpu":
        evaluated = 0 if work.evaluation is None else work.evaluation.total + cache
        return PeakBytes(**parts, total=max(highest.total, evaluated))
    return PeakBytes(**parts, total=max(host_bytes(work), work.load_bytes) + PROCESS_BYTES)


def host_bytes(work: Work) -> int:
    """Highest number of resident bytes from the first step on."""
    if platform.libc_ver()[0] != "glibc":
        return max(work.live().total, work.evaluation.total + sum(work.cache_blocks) if work.evaluation else 0)
    heap = Heap()
    for number, share in enumerate([*work.before[:SETTLING_PASSES], 1.0]):
        heap.replay(_scaled(work.step.trace, share), number, shapes=share)
    if work.evaluation is not None:
        heap.replay(work.evaluation.trace, EVALUATION, shapes=EVALUATION)
        for number, size in enumerate(work.cache_blocks):
            heap.allocate(("cache", number), size)
    return work.step.held + heap.peak_bytes


def _scaled(trace: Sequence[tuple[int, int]], share: float) -> Iterable[tuple[int, int]]:
    """The trace of a micro-batch with so many of the longest one's tokens: freed blocks of other sizes are what keeps
    a heap from being filled."""
    if share == 1.0:
        return trace
    return ((number, _scaled_bytes(size, share)) for number, size in trace)


def _scaled_bytes(size: int, share: float) -> int:
    return size if abs(size) < LEAST_SCALED_BYTES else round(size * share / ALIGNMENT) * ALIGNMENT
