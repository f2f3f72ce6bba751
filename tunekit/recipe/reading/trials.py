"""Makes one checked recipe for each trial, from the section `sweep:` or from KEY=V1,V2 on the command line."""

import copy
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from tunekit.errors import Problem, RecipeError
from tunekit.recipe.load import LoadedRecipe, check_draft, read_draft
from tunekit.recipe.reading.checks import SEED
from tunekit.recipe.reading.draft import COMMAND_LINE, Draft, KeyPath, Place
from tunekit.recipe.reading.overrides import HERE, apply_values
from tunekit.recipe.reading.yaml_reader import read_yaml
from tunekit.recipe.sweep import SweepSection

MOST_TRIALS = 1000
MOST_VALUE, MOST_NAME = 40, 150  # characters in the name of a folder
KEYS: KeyPath = ("sweep", "keys")
PLACE: KeyPath = ("output", "dir")
_UNSAFE = re.compile(r"[^A-Za-z0-9.+_-]+")

Axis = tuple[str, list[tuple[object, Place]]]  # a dotted key, and its values with their places


@dataclass(frozen=True)
class SweepTrial:
    """One run of a sweep. `name`: its folder. `setting`: the name without the seed of sweep.seeds."""

    name: str
    setting: str
    values: dict[str, object]  # by dotted key; `without`: the source that is left out
    loaded: LoadedRecipe


@dataclass(frozen=True)
class LoadedSweep:
    """The recipe of a sweep, and its trials."""

    loaded: LoadedRecipe
    section: SweepSection
    trials: list[SweepTrial]


def load_sweep(path: str, overrides: Sequence[str] = ()) -> LoadedSweep:
    """Read a recipe and make the recipe of every trial. An override KEY=V1,V2 replaces the values of sweep.keys.KEY.

    Raises: RecipeError with the problems of all trials.
    """
    plain, swept = _split(overrides)
    draft, tool = read_draft(path, plain)
    if draft.values.get("sweep") is None:
        draft.set(("sweep",), {}, HERE)
    if isinstance(draft.get(KEYS, {}), dict) and isinstance(draft.values["sweep"], dict):
        for key, values in swept.items():
            draft.set((*KEYS, key), values, HERE)
    loaded = check_draft(copy.deepcopy(draft), tool)
    section = loaded.sweep
    if section is None or not section.has_trials:
        what, how = "there is nothing to sweep", "write KEY=V1,V2 after the recipe, or the section `sweep:` in it"
        raise RecipeError(what, how, file=path)
    axes = [(key, [(value, draft.place((*KEYS, key, at))) for at, value in enumerate(values)])
            for key, values in section.keys.items()]  # fmt: skip
    total, seed = math.prod(len(values) for _, values in axes), loaded.recipe.training.seed
    count = total if section.trials is None else min(section.trials, total)
    left_out = [None, *range(len(loaded.recipe.data.train))] if section.leave_out else [None]
    trials = count * section.seeds * len(left_out)
    if trials > MOST_TRIALS:
        what = f"{trials:,} trials, and the maximum is {MOST_TRIALS:,}"
        raise RecipeError(what, "write strategy: random and trials, or fewer values", file=path, key="sweep")
    numbers = range(total) if count == total else sorted(random.Random(seed).sample(range(total), count))
    seeds = list(range(seed, seed + section.seeds)) if section.seeds > 1 else [None]
    del draft.values["sweep"]
    variants = list(product([_combination(axes, at) for at in numbers], left_out))
    return LoadedSweep(loaded, section, _make_trials(draft, tool, variants, seeds))


def _split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[object]]]:
    """Overrides of one value, and the values of KEY=V1,V2. A comma in quotes or brackets does not divide values."""
    plain: list[str] = []
    swept: dict[str, list[object]] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            values = [] if text.startswith("~") else read_yaml(f"[{value}]", COMMAND_LINE).values
        except RecipeError:
            values = []
        if isinstance(values, list) and len(values) > 1 and key not in swept:
            swept[key] = values
        else:
            plain.append(text)
    return plain, swept


def _combination(axes: Sequence[Axis], number: int) -> dict[str, tuple[object, Place]]:
    """The values of one combination of all axes; the last axis changes fastest."""
    values: dict[str, tuple[object, Place]] = {}
    for key, choices in reversed(axes):
        number, at = divmod(number, len(choices))
        values[key] = choices[at]
    return {key: values[key] for key, _ in axes}


def _make_trials(
    draft: Draft,
    tool: str | None,
    variants: Sequence[tuple[dict[str, tuple[object, Place]], int | None]],
    seeds: Sequence[int | None],
) -> list[SweepTrial]:
    """A trial for each variant and seed. A variant: the values of a combination, and the number of the source that is
    left out. None as a seed: the recipe's seed.

    Raises: RecipeError with the problems of all trials.
    """
    trials: list[SweepTrial] = []
    problems: list[Problem] = []
    names: set[str] = set()
    leaves_out = any(source is not None for _, source in variants)
    for combination, source in variants:
        named = {key: value for key, (value, _) in combination.items()}
        if leaves_out:
            named["without"] = "nothing" if source is None else draft.get(("data", "train", source, "path"))
        setting = _new_name(named, names)
        for seed in seeds:
            values = combination if seed is None else {**combination, SEED: (seed, draft.place(("sweep", "seeds")))}
            name = setting if seed is None else f"{setting},seed={seed}".removeprefix(",")
            try:
                plain = named if seed is None else {**named, SEED: seed}
                trials.append(SweepTrial(name, setting, plain, _load_trial(draft, tool, name, values, source)))
            except RecipeError as error:
                problems += error.problems
    if problems:
        raise RecipeError.of(problems, draft.rewrites)
    return trials


def _load_trial(
    draft: Draft, tool: str | None, name: str, values: Mapping[str, tuple[object, Place]], left_out: int | None
) -> LoadedRecipe:
    """The checked recipe of one trial. `left_out`: the number of the source that is removed."""
    draft = copy.deepcopy(draft)
    apply_values(draft, {key: (copy.deepcopy(value), place) for key, (value, place) in values.items()})
    if left_out is not None:
        draft.remove(("data", "train", left_out))
    draft.set(PLACE, f"{draft.get(PLACE)}/{name}", draft.place(PLACE))
    return check_draft(draft, tool)


def _new_name(values: Mapping[str, object], names: set[str]) -> str:
    """A readable name for a folder, such as learning_rate=0.0001,r=8. It is added to `names`."""
    leaves = [key.rpartition(".")[2] for key in values]
    short = len(set(leaves)) == len(leaves)
    parts = [
        f"{leaf if short else key}={_text(value)}" for leaf, (key, value) in zip(leaves, values.items(), strict=True)
    ]
    name = ",".join(parts)
    name = f"trial-{len(names) + 1}" if len(name) > MOST_NAME else name
    while name in names:
        name += "+"
    names.add(name)
    return name


def _text(value: object) -> str:
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    return _UNSAFE.sub("-", text)[-MOST_VALUE:].strip("-")
