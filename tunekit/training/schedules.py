"""The number of updates made goes in, a multiplier of the learning rate comes out; transformers' conventions."""

from __future__ import annotations

import math

from tunekit.recipe.training import TrainingSection


def warmup_steps(settings: TrainingSection, steps: int) -> int:
    """Warm-up steps: as written, or ceil(ratio * steps)."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil((settings.warmup_ratio or 0.0) * steps)


def rate_multiplier(scheduler: str, update: int, steps: int, warmup: int) -> float:
    """Multiplier for update number `update` (0-based).

    Warm-up: update / warmup, so that its first update has rate 0. Then constant 1; linear (steps - u) / (steps - w);
    cosine 0.5 (1 + cos(pi (u - w) / (steps - w))).    Source: transformers.optimization.
    """
    if update < warmup:
        return update / max(1, warmup)
    progress = (update - warmup) / max(1, steps - warmup)
    if scheduler == "linear":
        return max(0.0, 1.0 - progress)
    if scheduler == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0
