"""From simulated steps to the peak of a run, by part.

Comes in: Simulations of the longest batches, what loading the base takes.  Goes out: PeakBytes.  Next: plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunekit.decisions import PeakBytes
from tunekit.memory.tracker import Simulation


def peak_bytes(step: Simulation, others: Sequence[Simulation] = (), load_bytes: int = 0) -> PeakBytes:
    """The highest of a training step, of other simulated work and of loading; its parts, if that is not the loading.

    Parts are what is live at the highest moment; their sum is the total.
    """
    highest = max([step, *others], key=lambda simulation: simulation.total)
    parts = {name: highest.peak.get(name, 0) for name in ("weights", "adapter", "optimizer", "activations", "logits")}
    return PeakBytes(**parts, total=max(highest.total, load_bytes))
