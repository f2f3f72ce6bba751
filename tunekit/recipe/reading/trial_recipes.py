"""Makes one checked recipe for each trial, from the section `sweep:` or from KEY=V1,V2 on the command line."""

import contextlib
import copy
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from tunekit.errors import Problem, RecipeError
from tunekit.recipe.load import LoadedRecipe, check_draft, place_order, read_draft
from tunekit.recipe.reading.checks import SEED
from tunekit.recipe.reading.draft import COMMAND_LINE, Draft, KeyPath, Place
from tunekit.recipe.reading.overrides import HERE, apply_values
from tunekit.recipe.reading.yaml_reader import read_yaml
from tunekit.recipe.sweep import SweepSection

MOST_TRIALS = 1000
MOST_VALUE, MOST_NAME = 40, 150  # characters in the name of a folder
KEYS: KeyPath = ("sweep", "keys")
PLACE: KeyPath = ("output", "dir")
PLAIN = "the recipe"  # the name of the only setting, if only seeds or folds differ
FOLDS, BEST = "folds", "best"  # folders next to the trials: the rows of the folds, the run of the best recipe
_UNSAFE = re.compile(r"[^A-Za-z0-9.+_-]+")

Axis = tuple[str, list[tuple[object, Place]]]  # a dotted key, and its values with their places


@dataclass(frozen=True)
class TrialRecipe:
    """One run of a sweep. `name`: the name of its folder. `setting`: this name without the seed and the fold."""

    name: str
    setting: str
    values: dict[str, object]  # by dotted key; `without`: the source that is left out; `fold`: its evaluation rows
    loaded: LoadedRecipe


@dataclass(frozen=True)
class SweepSetting:
    """The values of a setting, and a recipe with these values for use after the sweep. This recipe has no folds, and
    the original seed."""

    values: dict[str, object]
    loaded: LoadedRecipe


@dataclass(frozen=True)
class LoadedSweep:
    """The recipe of a sweep, its trials, and its settings by name."""

    loaded: LoadedRecipe
    section: SweepSection
    trials: list[TrialRecipe]
    settings: dict[str, SweepSetting]


@dataclass(frozen=True)
class Automatic:
    """The values that `sweep --auto` tries. `length`: the key that sets the length of a run. `eval_steps`: the value of
    training.eval_steps for each length, which gives all runs the same number of evaluations."""

    keys: dict[str, list[object]]
    length: str
    eval_steps: dict[float, int]


@dataclass(frozen=True)
class _Variant:
    """The values of one combination. `left_out`: the index of the source that is left out. `follows`: values that are
    computed from these, and are not part of the trial's name."""

    values: dict[str, tuple[object, Place]]
    left_out: int | None = None
    follows: dict[str, tuple[object, Place]] = field(default_factory=dict)


def fold_file(folder: str, source: int, fold: int) -> str:
    """The path of the file with one fold of a source's rows. `folder`: output.dir; `fold`: counted from 1."""
    return f"{folder}/{FOLDS}/source-{source + 1}-fold-{fold}.jsonl"


def load_sweep(path: str, overrides: Sequence[str] = (), automatic: Automatic | None = None) -> LoadedSweep:
    """Read a recipe and make the recipe of every trial. An override KEY=V1,V2 replaces the values of sweep.keys.KEY,
    and KEY=V1 sets KEY in all trials, also inside a section that differs between them. `automatic`: the values that
    --auto tries; the recipe must then list no values to try.

    Raises: RecipeError with the problems of all trials.
    """
    plain, swept, single = _split(overrides)
    draft, tool = read_draft(path, plain)
    if draft.values.get("sweep") is None:
        draft.set(("sweep",), {}, HERE)
    keys = draft.get(KEYS, {})
    if isinstance(keys, dict) and isinstance(draft.values["sweep"], dict):
        for key in [key for key in single if key in keys]:
            draft.remove((*KEYS, key))
        sections = [f"{name}." for name in (*keys, *swept)]
        swept |= {key: value for key, value in single.items() if key.startswith(tuple(sections))}
        for key, values in swept.items():
            draft.set((*KEYS, key), values, HERE)
    if automatic is not None:
        draft.set(KEYS, automatic.keys, HERE)
        draft.set(("sweep", "strategy"), "halving", HERE)
    loaded = _check_sweep(draft, tool)
    section = loaded.sweep
    if section is None or not section.has_trials:
        what, how = "there is nothing to sweep", "write KEY=V1,V2 after the recipe, or the section `sweep:` in it"
        raise RecipeError(what, how, file=path)
    axes = [(key, [(value, draft.place((*KEYS, key, at))) for at, value in enumerate(values)])
            for key, values in section.keys.items()]  # fmt: skip
    total, seed = math.prod(len(values) for _, values in axes), loaded.recipe.training.seed
    count = total if section.trials is None else min(section.trials, total)
    left_out = [None, *range(len(loaded.recipe.data.train))] if section.leave_out else [None]
    trials = count * section.seeds * (section.folds or 1) * len(left_out)
    if trials > MOST_TRIALS:
        what = f"{trials:,} trials are more than the maximum of {MOST_TRIALS:,}"
        raise RecipeError(what, "write strategy: random with trials, or fewer values", file=path, key="sweep")
    numbers = range(total) if count == total else sorted(random.Random(seed).sample(range(total), count))
    written = draft.place(("sweep", "seeds"))
    del draft.values["sweep"]
    variants = [_Variant(*pair) for pair in product([_combination(axes, at) for at in numbers], left_out)]
    if automatic is not None:
        variants = [replace(each, follows=_following(each, automatic)) for each in variants]
    return LoadedSweep(loaded, section, *_make_trials(draft, tool, variants, section, seed, written))


def refuse_values(section: SweepSection | None, path: str) -> None:
    """Raises: RecipeError if the recipe lists values to try, which --auto chooses."""
    others = [
        name for name in ("keys", "trials", "folds", "leave_out") if section is not None and getattr(section, name)
    ]
    if others:
        how = f"remove sweep.{others[0]} (~sweep.{others[0]}), or leave out --auto"
        raise RecipeError("--auto chooses the values to try", how, file=path, key=f"sweep.{others[0]}")


def _following(variant: _Variant, automatic: Automatic) -> dict[str, tuple[object, Place]]:
    value, place = variant.values[automatic.length]
    return {"training.eval_steps": (automatic.eval_steps[float(str(value))], place)}


def _check_sweep(draft: Draft, tool: str | None) -> LoadedRecipe:
    """The checked recipe with its section `sweep`. If the recipe is incomplete without the values of sweep.keys, it has
    the first value of each key.

    Raises: RecipeError with the problems of the recipe, and with the problems of each value of sweep.keys.
    """
    keys = draft.get(KEYS)
    lists = (
        {str(key): values for key, values in keys.items() if isinstance(values, list)} if isinstance(keys, dict) else {}
    )
    try:
        return check_draft(copy.deepcopy(draft), tool)
    except RecipeError as error:
        first, problems = copy.deepcopy(draft), list(error.problems)
        with contextlib.suppress(RecipeError):
            values = {
                key: (copy.deepcopy(each[0]), draft.place((*KEYS, key, 0))) for key, each in lists.items() if each
            }
            apply_values(first, values)
            return check_draft(first, tool)
        plain = copy.deepcopy(draft)
        plain.values.pop("sweep")
        for key, each in lists.items():
            for at, value in enumerate(each):
                trial, place = copy.deepcopy(plain), draft.place((*KEYS, key, at))
                try:
                    apply_values(trial, {key: (copy.deepcopy(value), place)})
                    check_draft(trial, tool)
                except RecipeError as wrong:
                    problems += wrong.problems
        raise RecipeError.of(sorted(problems, key=place_order), error.notes) from None


def _split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[object]], dict[str, list[object]]]:
    """Returns the overrides with one value; a mapping KEY -> values for overrides with several values (KEY=V1,V2); and
    such a mapping for those with one value. A comma inside quotes or brackets does not separate values. Raises:
    RecipeError if the values of a key are given twice."""
    plain = dict[str, str]()  # override -> its key
    swept: dict[str, list[object]] = {}
    single: dict[str, list[object]] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            values = [] if text.startswith("~") else read_yaml(f"[{value}]", COMMAND_LINE).values
        except RecipeError:
            values = []
        if key in swept or (key in plain.values() and isinstance(values, list) and len(values) > 1):
            how = "write all its values once: KEY=V1,V2"
            raise RecipeError("has values already", how, file=COMMAND_LINE, key=key)
        if isinstance(values, list) and len(values) > 1:
            swept[key] = values
        else:
            plain[text] = key
            single |= {key: values} if isinstance(values, list) and values else {}
    return list(plain), swept, single


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
    variants: Sequence[_Variant],
    section: SweepSection,
    seed: int,
    written: Place,
) -> tuple[list[TrialRecipe], dict[str, SweepSetting]]:
    """Makes a trial for each variant, seed and fold, and the setting of each variant by name. `seed`: the seed of the
    recipe; `written`: the place where the recipe has sweep.seeds.

    Raises: RecipeError with the problems of all trials.
    """
    trials: list[TrialRecipe] = []
    problems: list[Problem] = []
    settings: dict[str, SweepSetting] = {}
    seeds = range(seed, seed + section.seeds) if section.seeds > 1 else [None]
    repeats = list(product(seeds, range(1, section.folds + 1) if section.folds else [None]))
    leaves_out, names = any(variant.left_out is not None for variant in variants), set[str]()
    for variant in variants:
        named = {key: value for key, (value, _) in variant.values.items()}
        if leaves_out:
            source = variant.left_out
            named["without"] = "nothing" if source is None else draft.get(("data", "train", source, "path"))
        stem = _new_name(named, names)
        setting = stem or PLAIN
        try:
            best = _load_trial(draft, tool, BEST, {**variant.values, **variant.follows}, variant.left_out)
        except RecipeError as error:
            problems += error.problems
            continue
        if section.folds is None and not best.recipe.data.eval:
            what = f"{setting} has no evaluation rows, and trials are compared on these"
            problems.append(Problem(what, "set data.eval in every trial", file=str(best.path), key="data.eval"))
        settings[setting] = SweepSetting(named, best)
        for own_seed, fold in repeats:
            values, plain, suffix = {**variant.values, **variant.follows}, dict(named), ""
            if own_seed is not None:
                values[SEED], plain[SEED], suffix = (own_seed, written), own_seed, f",seed={own_seed}"
            if fold is not None:
                plain["fold"], suffix = fold, f"{suffix},fold={fold}"
            name = f"{stem}{suffix}".removeprefix(",")
            parts = None if section.folds is None or fold is None else (section.folds, fold)
            loaded = _load_trial(draft, tool, name, values, variant.left_out, parts)
            trials.append(TrialRecipe(name, setting, plain, loaded))
    if problems:
        raise RecipeError.of(problems, draft.rewrites)
    return trials, settings


def _load_trial(
    draft: Draft,
    tool: str | None,
    name: str,
    values: Mapping[str, tuple[object, Place]],
    left_out: int | None,
    folds: tuple[int, int] | None = None,
) -> LoadedRecipe:
    """The checked recipe of one trial. `left_out`: the index of the source to remove; `folds`: the number of folds, and
    the number of the fold to evaluate on."""
    draft = copy.deepcopy(draft)
    apply_values(draft, {key: (copy.deepcopy(value), place) for key, (value, place) in values.items()})
    if left_out is not None:
        draft.remove(("data", "train", left_out))
    folder, place = draft.get(PLACE), draft.place(PLACE)
    if folds is not None:
        _divide_rows(draft, str(folder), *folds, place)
    draft.set(PLACE, f"{folder}/{name}", place)
    return check_draft(draft, tool)


def _divide_rows(draft: Draft, folder: str, count: int, fold: int, place: Place) -> None:
    """Replace each source by the files of its folds: one fold to evaluate on, the other folds to train on."""
    sources = draft.get(("data", "train"))
    for name in ("train", "eval"):
        parts = []
        for number, source in enumerate(sources):
            options = {key: source[key] for key in ("format", "weight") if key in source}
            options = options if name == "train" else {key: options[key] for key in options if key != "weight"}
            others = [other for other in range(1, count + 1) if (other == fold) == (name == "eval")]
            parts += [{"path": fold_file(folder, number, other), **options} for other in others]
        draft.set(("data", name), parts, place)


def _new_name(values: Mapping[str, object], names: set[str]) -> str:
    """Makes a readable name for a folder, such as learning_rate=0.0001,r=8, and adds the name to `names`."""
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
