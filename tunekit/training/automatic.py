"""Chooses the learning rates, training lengths and ranks that `sweep --auto` tries. The more time is allowed, the more
values are tried."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from tunekit.artifacts.run import read_json
from tunekit.errors import RunFolderError
from tunekit.recipe.reading.trial_recipes import Automatic
from tunekit.recipe.recipe import Recipe
from tunekit.records import Plan
from tunekit.training.halving import halving_seconds, rung_count, rung_step
from tunekit.training.timing import Costs

RATES = ((1 / 3, 1, 3, 10), (1, 3, 10), (1, 3))  # factors of the recipe's values, the most first
LENGTHS = ((1, 3, 9), (1, 3), (1,), (1 / 3,))
RANKS = ((1, 4), (1,))
SHARE = 0.8  # of the time that the predicted trials may take
AUTO_NAME = "auto.json"  # the chosen values, for a resume
RATE, RANK, EPOCHS, STEPS = "training.learning_rate", "adapter.r", "training.epochs", "training.max_steps"


@dataclass(frozen=True)
class AutomaticChoice:
    """The values to try, and the predicted seconds of all trials. The prediction assumes that the longest trials
    continue after each comparison. `shortened`: whether all trials are shorter than the recipe's run."""

    automatic: Automatic
    trials: int
    seconds: float
    shortened: bool


def choose_values(recipe: Recipe, plan: Plan, costs: Costs, seconds: float, seeds: int = 1) -> AutomaticChoice | None:
    """Choose the largest set of training lengths, learning rates and ranks whose trials, with `seeds` seeds each, are
    predicted to take at most SHARE of `seconds`. The set includes the recipe's own values; only if two runs of the
    recipe's length take longer, all trials have a third of it. None if there is no time for two learning rates."""
    for choice in _choices(recipe, plan, costs, seeds):
        if choice.seconds <= SHARE * seconds:
            return choice
    return None


def earlier_choice(folder: Path) -> Automatic | None:
    """The values that an earlier `sweep --auto` has chosen in this folder; None if there are none.

    Raises: RunFolderError if their file is damaged.
    """
    file = folder / AUTO_NAME
    earlier = read_json(file)
    if earlier is None:
        return None
    try:
        length = str(earlier["length"])
        # the names of the trials follow this order, which the file does not keep
        keys = {key: list(earlier["keys"][key]) for key in (length, RATE, RANK) if key in earlier["keys"]}
        steps = {float(value): int(count) for value, count in earlier["eval_steps"]}
        if set(keys[length]) != set(steps):
            raise ValueError(length)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{file} is damaged", "choose another output.dir") from error
    return Automatic(keys, length, steps)


def choice_record(automatic: Automatic) -> dict[str, object]:
    """The content of the file that `earlier_choice` reads."""
    return {**asdict(automatic), "eval_steps": list(automatic.eval_steps.items())}


def _choices(recipe: Recipe, plan: Plan, costs: Costs, seeds: int) -> Iterator[AutomaticChoice]:
    """Yields all sets of values, ordered by the number of training lengths, then of learning rates, then of ranks. The
    largest sets come first."""
    training, rank = recipe.training, getattr(recipe.adapter, "r", None)
    length, key = (training.max_steps, STEPS) if training.epochs is None else (training.epochs, EPOCHS)
    assert length is not None  # the recipe's checks refuse neither
    for lengths, rates, ranks in product(LENGTHS, RATES, RANKS if _ranks_fit(plan, rank) else ((1,),)):
        values = [length if factor == 1 else _length(key, length * factor) for factor in lengths]
        rate = training.learning_rate
        keys: dict[str, list[object]] = {
            key: list(values),
            RATE: [rate if factor == 1 else _rounded(rate * factor) for factor in rates],
        }
        if isinstance(rank, int) and len(ranks) > 1:
            keys[RANK] = [rank * factor for factor in ranks]
        settings = len(lengths) * len(rates) * len(ranks)
        steps = {value: math.ceil(plan.steps * factor) for value, factor in zip(values, lengths, strict=True)}
        intervals = {value: max(1, math.ceil(count / 2 ** rung_count(settings))) for value, count in steps.items()}
        predicted = seeds * halving_seconds(_parts(recipe, plan, costs, steps, intervals, settings))
        yield AutomaticChoice(Automatic(keys, key, intervals), seeds * settings, predicted, max(lengths) < 1)


def _ranks_fit(plan: Plan, rank: object) -> bool:
    """Whether the recipe sets a rank, and every adapted matrix is large enough for the largest rank to try."""
    sides = [min(target.in_features, target.out_features) for target in plan.targets if target.r is not None]
    return isinstance(rank, int) and rank * max(map(max, RANKS)) <= min(sides, default=0)


def _parts(
    recipe: Recipe, plan: Plan, costs: Costs, steps: Mapping[float, int], intervals: Mapping[float, int], settings: int
) -> dict[str, list[float]]:
    """For each of `settings` settings, the seconds of a trial between consecutive comparisons. They depend on the
    training length, not on the learning rate or the rank."""
    parts: dict[str, list[float]] = {}
    for value, count in steps.items():
        often = recipe.training.model_copy(update={"eval_steps": intervals[value]})
        ends = [rung_step(count, left, intervals[value]) for left in range(rung_count(settings), 0, -1)]
        seconds = costs.of_parts(replace(plan, steps=count), recipe.model_copy(update={"training": often}), ends)
        parts |= {f"{value} {at}": seconds for at in range(settings // len(steps))}
    return parts


def most_that_fit(order: Sequence[str], parts: Mapping[str, Sequence[float]], seconds: float) -> int:
    """How many settings can be trained to their end within `seconds`: at least one, and at most half of `order`.

    `order`: the names of the settings, best first. `parts`: for each setting, the seconds of training before each of
    its next comparisons.
    """
    for count in range(math.ceil(len(order) / 2), 1, -1):
        if halving_seconds({name: parts[name] for name in order[:count]}) <= seconds:
            return count
    return 1


def _length(key: str, length: float) -> float:
    """A training length as the recipe accepts it: a whole number of steps, or epochs in hundredths."""
    return max(1, round(length)) if key == STEPS else max(0.01, round(length, 2))


def _rounded(rate: float) -> float:
    """The learning rate, rounded to two digits."""
    return float(f"{rate:.1e}")
