"""Estimates how many steps fit into training.max_minutes, and how far the schedule then gets."""

from collections.abc import Iterator
from pathlib import Path

from tunekit.artifacts.report.values import Values
from tunekit.artifacts.run import read_json
from tunekit.recipe.recipe import Recipe
from tunekit.training.schedules import rate_multiplier, warmup_steps
from tunekit.training.time_limit import KEY


def time_notes(recipe: Recipe, steps: int) -> Iterator[str]:
    """A note about the steps that fit into the limit, from the last report in output.dir."""
    training, folder = recipe.training, Path(recipe.output.dir)
    if training.limit_seconds is None:
        return
    report = Values(read_json(folder / "report.json") or {})
    seconds, done = report.numbers("seconds"), report.count("final_step")
    starts = [start.number("minutes") or 0.0 for start in report.parts("starts")]
    if not starts or not done:
        yield f"{KEY}: {training.max_minutes:g}; tunekit train RECIPE --dry-run estimates how many steps fit"
        return
    of_steps = sum(seconds.get(part, 0.0) for part in ("train", "evaluate", "save"))
    other = (60 * sum(starts) - of_steps) / len(starts)
    yield fitting_text(recipe, steps, training.limit_seconds - other, of_steps / done, f"the last run in {folder}")


def fitting_text(recipe: Recipe, steps: int, left_seconds: float, step_seconds: float, source: str) -> str:
    """A sentence about the steps that fit into the time that is left for steps. `source`: of the estimate."""
    training, limit = recipe.training, f"{KEY}: {recipe.training.max_minutes:g}"
    count, estimate = int(max(left_seconds, 0.0) / max(step_seconds, 1e-9)), f"(an estimate from {source})"
    if not count:
        needed = (training.limit_seconds or 0.0) - left_seconds + step_seconds
        return f"{limit}: probably no step fits into one start {estimate}; write at least {needed / 60:.1f}"
    fit = f"{limit}: about {min(count, steps):,} of {steps:,} steps fit into one start {estimate}"
    if count >= steps:
        return fit
    end = f"at {rate_multiplier(training, count, steps, warmup_steps(training, steps)):.0%} of training.learning_rate"
    return f"{fit}; the schedule then stops {end}, and the rest of its decay is lost unless --resume continues"
