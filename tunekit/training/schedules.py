"""Learning-rate schedules: functions from the number of an update to a multiplier of the learning rate. The formulas
are those of transformers."""

import math
from typing import Any

from tunekit.recipe.training import SCHEDULERS, TrainingSection


def warmup_steps(settings: TrainingSection, steps: int) -> int:
    """The number of warm-up steps: from the recipe, or ceil(ratio * steps)."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil((settings.warmup_ratio or 0.0) * steps)


def rate_multiplier(training: TrainingSection, update: int, steps: int, warmup: int) -> float:
    """The multiplier of the learning rate for update number `update` (0-based).

    Warm-up: update / warmup, so that the first update has rate 0. After it, with p = (update - warmup) / (steps -
    warmup) and c = num_cycles:
    linear: 1 - p.
    cosine: (1 + cos(2 pi c p)) / 2; with min_lr, rescaled to end at min_lr.
    restarts: (1 + cos(pi (c p mod 1))) / 2.
    polynomial: (1 - p)^power, rescaled to end at lr_end.
    inverse_sqrt: sqrt(t / (update - warmup + t)), t = timescale.
    Source: transformers.optimization.
    """
    settings: dict[str, Any] = {**SCHEDULERS[training.scheduler], **training.scheduler_settings}
    if training.scheduler == "warmup_stable_decay":
        return _stable_then_decayed(settings, update, steps, warmup)
    if update < warmup:
        return update / warmup
    progress = (update - warmup) / max(1, steps - warmup)
    match training.scheduler:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return _cosine(settings["num_cycles"] * progress)
        case "cosine_with_min_lr":
            minimum = settings["min_lr_rate"] if settings["min_lr"] is None else _share(settings["min_lr"], training)
            return _above(minimum, _cosine(settings["num_cycles"] * progress))
        case "cosine_with_restarts":
            return _cosine(settings["num_cycles"] * progress % 1.0 / 2)
        case "polynomial":
            return _above(_share(settings["lr_end"], training), (1.0 - progress) ** settings["power"])
        case "inverse_sqrt":
            timescale = settings["timescale"] or warmup or 10_000
            return math.sqrt(timescale / (update - warmup + timescale))
    return 1.0


def _stable_then_decayed(settings: dict[str, Any], update: int, steps: int, warmup: int) -> float:
    """The multiplier of a schedule with three phases: a warm-up from min_lr_ratio to 1; a constant 1; a decay to
    min_lr_ratio in the last num_decay_steps steps (default: a tenth of all steps)."""
    decay = math.ceil(steps / 10) if settings["num_decay_steps"] is None else settings["num_decay_steps"]
    progress = 1 - (steps - update) / max(1, decay)
    if update < warmup:
        factor = update / warmup
    elif progress <= 0:
        factor = 1.0
    elif settings["decay_type"] == "cosine":
        factor = _cosine(settings["num_cycles"] * progress)
    else:
        factor = 1.0 - (progress if settings["decay_type"] == "linear" else math.sqrt(progress))
    return _above(settings["min_lr_ratio"], factor)


def _cosine(turns: float) -> float:
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * turns))


def _above(minimum: float, factor: float) -> float:
    """Rescale `factor` from the range 0 to 1 to the range `minimum` to 1."""
    return minimum + (1.0 - minimum) * factor


def _share(rate: float, training: TrainingSection) -> float:
    return rate / training.learning_rate if training.learning_rate else 0.0
