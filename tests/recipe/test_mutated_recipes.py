"""1,000 random recipes: the valid ones are read, the bad ones refused in words with a place, none with a traceback."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.recipe_mutator import VALUES, Case, make_bad_value_case, make_cases, make_valid_case
from tunekit.errors import Problem, RecipeError
from tunekit.recipe.data import Source
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.dump import dump_recipe
from tunekit.recipe.reading.sections import section_class
from tunekit.recipe.recipe import Recipe

SEED = int(os.environ.get("TUNEKIT_TEST_SEED", "0"))
COUNT = 1000


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    print(f"recipe mutator seed: {SEED} (TUNEKIT_TEST_SEED)")
    return list(make_cases(COUNT, SEED))


def write_case(case: Case, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(case.text.encode("utf-8"))
    return path


def find_problems(path: Path, case: Case) -> tuple[Problem, ...]:
    try:
        load_recipe(path, case.overrides)
    except RecipeError as error:
        return error.problems
    return ()


@pytest.mark.drawn
def test_valid_recipes_are_read_and_written_back_equal(cases: Iterable[Case], tmp_path: Path) -> None:
    elsewhere = tmp_path / "runs" / "first"
    elsewhere.mkdir(parents=True)
    for case in cases:
        if not case.valid:
            continue
        path = write_case(case, tmp_path)
        problems = find_problems(path, case)
        assert not problems, f"seed {SEED}: refused: {problems}\n{case}"
        recipe = load_recipe(path, case.overrides).recipe
        copy = elsewhere / "recipe.yaml"
        copy.write_text(dump_recipe(recipe, elsewhere), encoding="utf-8")
        assert load_recipe(copy).recipe == recipe, f"seed {SEED}: {case}"
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.sampled(20)
@pytest.mark.parametrize("key", VALUES)
def test_every_text_of_every_key(key: str, tmp_path: Path) -> None:
    for text in VALUES[key][0]:
        case = make_valid_case(random.Random(text), key, {key: [text]})
        assert find_problems(write_case(case, tmp_path), case) == (), case
    for text in VALUES[key][1]:
        case = make_bad_value_case(random.Random(text), key, text)
        lines = [str(problem) for problem in find_problems(write_case(case, tmp_path), case)]
        assert any(f": {key}" in line for line in lines), f"{lines}\n{case}"


@pytest.mark.drawn
def test_bad_recipes_are_refused_with_a_place(cases: Iterable[Case], tmp_path: Path) -> None:
    for case in cases:
        if case.valid:
            continue
        path = write_case(case, tmp_path)
        problems = find_problems(path, case)
        assert problems, f"seed {SEED}: accepted: {case}"
        assert any(case.culprit in str(problem) for problem in problems), case
        for problem in problems:
            line = str(problem)
            assert "\n" not in line, case
            assert len(line) < 1000, case
            assert line.startswith((str(path), "command line")), f"{line}\n{case}"


def test_the_mutator_covers_the_grammar(cases: list[Case]) -> None:
    assert sum(case.valid for case in cases) >= COUNT / 2
    known = {f"data.train.0.{name}" for name in Source.model_fields}
    for section in Recipe.model_fields:
        owner = section_class(section, None)
        assert owner is not None
        known |= {f"{section}.{name}" for name in owner.model_fields}
    known.remove("data.train")
    assert known == set(VALUES), "a key of the recipe is missing in the mutator's table, or the reverse"
    for verdict in (True, False):
        written = {key for case in cases if case.valid is verdict for key in case.keys}
        assert known <= written
