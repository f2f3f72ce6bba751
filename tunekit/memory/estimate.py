"""From simulated work to the peak of a run, by part.

Comes in: Simulations of the longest batches, what loading the base takes.  Goes out: PeakBytes.  Next: plan.py.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunekit.decisions import PeakBytes
from tunekit.memory.heap import Heap
from tunekit.memory.tracker import Simulation

SETTLING_STEPS = 3  # after so many the heap's shape repeats
# What a run on a CPU keeps resident beside tensors: code of libraries at its first use, modules, compiled kernels.
# The median of `scripts/bench process` (8 runs: 53 to 75 MB), none of which `scripts/bench estimate` judges.
PROCESS_BYTES = 58_000_000
PARTS = ("weights", "adapter", "optimizer", "activations", "logits")


@dataclass(frozen=True)
class Work:
    """What a run does, in order: the longest training step, then an evaluation and the cache of generated answers."""

    step: Simulation
    steps: int
    evaluation: Simulation | None = None
    cache_blocks: Sequence[int] = ()  # bytes of each key and each value tensor
    load_bytes: int = 0  # the most that loading the base takes

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
    for step in range(min(work.steps, SETTLING_STEPS)):
        heap.replay(work.step.trace, step)
    if work.evaluation is not None:
        heap.replay(work.evaluation.trace, SETTLING_STEPS)
        for number, size in enumerate(work.cache_blocks):
            heap.allocate(("cache", number), size)
    return work.step.held + heap.peak_bytes
