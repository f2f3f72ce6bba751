"""Which engine runs the windows of a run: the plan's word for where the base's weights wait decides.

Comes in: the base, or its slots.  Goes out: an Engine.
"""

from __future__ import annotations

from tunekit.contracts import Engine
from tunekit.memory.slots import LayerSlots
from tunekit.memory.splitting import Splitting
from tunekit.training.engines.resident import ResidentEngine
from tunekit.training.engines.streaming import StreamingEngine


def make_engine(
    seed: int, slots: LayerSlots | None, pass_micro_batches: int, splitting: Splitting | None = None
) -> Engine:
    """Layer by layer where there are slots, else micro-batch by micro-batch."""
    if slots is None:
        return ResidentEngine(seed, splitting)
    return StreamingEngine(seed, slots, pass_micro_batches, splitting)
