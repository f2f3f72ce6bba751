"""Rewards of completions: functions as TRL calls them, expressions, columns, sums; files that cannot be used."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunekit.companions.rewards import TRAINING_SECONDS, RewardFunctions, make
from tunekit.contracts import CompanionSpec, Row
from tunekit.errors import RecipeError, RewardError
from tunekit.objectives.losses.advantages import teaches_nothing
from tunekit.objectives.rows.prompts import Completion, Sample, completions_of
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.grpo import GrpoSettings

SAID = [
    Completion("p", {"answer": "7", "level": 1}, "so #### 7"),
    Completion([{"role": "user", "content": "q"}], {"answer": 8, "level": 2}, " 8 "),
    Completion("p", {"level": 3}, "nothing"),
]


def rewards_of(*sources: dict[str, Any]) -> RewardFunctions:
    return make(CompanionSpec("rewards", "objective.reward", GrpoSettings.model_validate({"reward": sources})))


def loaded(*sources: dict[str, Any]) -> RewardFunctions:
    rewards = rewards_of(*sources)
    rewards.load(torch.device("cpu"))
    return rewards


def test_expressions_and_columns() -> None:
    found = loaded(
        {"regex": "^so"}, {"exact_match": "answer"}, {"exact_match": "answer", "extract": r"#### (\d+)", "weight": 0.5}
    )
    assert found.names == ["regex", "exact_match_2", "exact_match_3"]
    scores = found.score(SAID)
    np.testing.assert_array_equal(scores, [[1, 0, 1], [0, 1, 0], [0, np.nan, np.nan]])
    np.testing.assert_array_equal(found.weighted(scores), [1.5, 1.0, 0.0])
    np.testing.assert_array_equal(found.weighted(np.full((1, 3), np.nan)), [np.nan])
    with pytest.raises(
        RewardError, match="no row has the column 'right' that is needed by the reward exact_match: right; the"
    ):
        loaded({"exact_match": "right"}).scored_by(0, SAID)
    assert np.isnan(loaded({"exact_match": "right"}).score(SAID)).all()


def test_functions_get_what_they_take_and_are_told_as_trl_tells(tmp_path: Path) -> None:
    (tmp_path / "nearby.py").write_text("WORTH = 2.0\n", encoding="utf-8")
    code = """
from dataclasses import dataclass
from nearby import WORTH

@dataclass
class Judge:
    worth: float

def few(completions, level):
    return [Judge(WORTH * number).worth for number in level]

def every(prompts, completions, answer, **columns):
    assert prompts == ["p", [{"role": "user", "content": "q"}], "p"]
    assert completions == ["so #### 7", [{"role": "assistant", "content": " 8 "}], "nothing"]
    assert (answer, columns) == (["7", 8, None], {"level": [1, 2, 3]})
    return (None if right is None else 1 for right in answer)
"""
    (tmp_path / "rewards.py").write_text(code, encoding="utf-8")
    named = [{"function": f"{tmp_path}/rewards.py:{name}", "allow_code": True} for name in ("few", "every")]
    before = list(sys.path)
    found = loaded(*named)
    np.testing.assert_array_equal(found.score(SAID), [[2, 1], [4, 1], [6, np.nan]])
    assert sys.path == before
    assert list(found.fingerprint()) == ["objective.reward.0.function", "objective.reward.1.function"]
    old = found.fingerprint()
    (tmp_path / "rewards.py").write_text(f"{code}\n", encoding="utf-8")
    assert set(found.fingerprint().values()).isdisjoint(old.values())


def test_every_module_of_the_folder_that_is_loaded_decides_a_resume(tmp_path: Path) -> None:
    """Imported at the top, inside a function, by a module that is imported, relatively in a package, or by its name as
    text; modules that nothing imports, and those that are installed, do not."""
    code = """
import importlib
import json
from nearby import WORTH
named = importlib.import_module("named_as_text")

def score(completions, **columns):
    import late.inner
    return [WORTH + late.inner.MORE + named.EVEN_MORE for _ in completions]
"""
    (tmp_path / "late").mkdir()
    files = {
        "rewards.py": code,
        "nearby.py": "from deeper import WORTH\n",
        "deeper.py": "WORTH = 1.0\n",
        "late/__init__.py": "",
        "late/inner.py": "from .values import MORE\nfrom . import others\n",
        "late/values.py": "MORE = 2.0\n",
        "late/others.py": "",
        "named_as_text.py": "EVEN_MORE = 4.0\n",
        "unrelated.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    before, source = list(sys.path), {"function": f"{tmp_path}/rewards.py:score", "allow_code": True}

    def digests() -> list[dict[str, str]]:
        found = loaded(source)
        return [dict(found.fingerprint()), dict(found.begin(None, []))]  # type: ignore[arg-type]

    for name in [*sys.modules]:  # of an earlier test
        if name.split(".")[0] in ("nearby", "deeper", "late", "named_as_text"):
            del sys.modules[name]
    rewards = loaded(source)
    old = [dict(rewards.fingerprint()), dict(rewards.begin(None, []))]  # type: ignore[arg-type]
    assert rewards.score(SAID).tolist() == [[7.0]] * 3
    assert sys.path == before
    assert [list(each) for each in old] == [["objective.reward.0.function"]] * 2
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}# changed\n", encoding="utf-8")
        sys.modules.pop("named_as_text", None)
        found = digests()
        (tmp_path / name).write_text(text, encoding="utf-8")
        changed = [new != was for new, was in zip(found, old, strict=True)]
        assert changed == [name not in ("unrelated.py", "named_as_text.py"), name == "named_as_text.py"], name


def test_every_file_of_a_reward_model_decides_a_resume(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)

    def digest() -> str:
        return rewards_of({"model": str(model)}).fingerprint()["objective.reward.0.model"]

    old = digest()
    for name, was, is_ in (
        ("config.json", '"rms_norm_eps": 1e-', '"rms_norm_eps": 2e-'),
        ("tokenizer.json", '"Ń": 258', '"Ń": 259'),
        ("chat_template.jinja", "im_end", "im_stop"),
    ):
        text = (model / name).read_text("utf-8")
        (model / name).write_text(text.replace(was, is_), encoding="utf-8")
        assert text != (model / name).read_text("utf-8")
        assert digest() != old, name
        (model / name).write_text(text, encoding="utf-8")
    assert digest() == old


def test_completion_ids_are_what_the_model_wrote_as_in_trl(tmp_path: Path) -> None:
    code = """
def score(completions, completion_ids):
    return [float(sum(ids)) for ids in completion_ids]
"""
    (tmp_path / "rewards.py").write_text(code, encoding="utf-8")
    found = loaded({"function": f"{tmp_path}/rewards.py:score", "allow_code": True})
    assert found.reads_ids
    written = [Completion("p", {"completion_ids": "a column"}, "a b", ids=[3, 4, 2]), Completion("p", {}, "", ids=[2])]
    assert found.score(written).tolist() == [[9.0], [2.0]]


def test_columns_of_the_data_never_stand_in_for_completions(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def every(prompts, completions):\n    assert prompts == ['p']\n")
    with (tmp_path / "rewards.py").open("a") as file:
        file.write("    return [float(said == 'mine') for said in completions]\n")
    found = loaded({"function": f"{tmp_path}/rewards.py:every", "allow_code": True})
    written = Completion("p", {"completions": ["others"], "prompts": "x"}, "mine")
    assert found.score([written]) == [[1.0]]


FILES = [
    ("def other():\n    pass\n", "has no function score; it has: other"),
    ("score = 3\n", "has no function score; it has: none"),
    ("async def score(completions):\n    return []\n", "score is an async function"),
    ("import absent_module\n", r"cannot be run: ModuleNotFoundError: No module named 'absent_module' \(line 1\)"),
    ("def score(:\n", "cannot be run: SyntaxError"),
]


@pytest.mark.parametrize(("code", "said"), FILES)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "rewards.py").write_text(code, encoding="utf-8")
    found = rewards_of({"function": f"{tmp_path}/rewards.py:score", "allow_code": True})
    with pytest.raises(RewardError, match=rf"rewards\.py: {said}"):
        found.load(torch.device("cpu"))


def test_rewards_that_are_equal_or_absent_teach_nothing() -> None:
    none = float("nan")
    groups = np.array([[1.0, 2.0, none], [1.0, none, none], [none] * 3, [0.5, 0.5, none], [0.1 + 0.2, 0.3, 0.3]])
    assert teaches_nothing(groups, axis=1).tolist() == [False, True, True, True, True]
    assert not teaches_nothing(groups)
    assert teaches_nothing(groups[1:3])


def test_expressions_keep_the_meaning_that_python_gives_them() -> None:
    texts = ["<think>\n</think> YES", "ab ab", "a{e<=1}", "x]", "x" * 30, r"\boxed{3}", "{", "yes"]
    for pattern in (r"(?s)<think>.*?</think>", "(?i)yes", r"(\w+) \1", "a{e<=1}", "[x[:alpha:]]", "^.{20,2000}$", "{"):
        scores = loaded({"regex": pattern}).score([Completion("p", {}, text) for text in texts])
        assert scores[:, 0].tolist() == [float(re.search(pattern, text) is not None) for text in texts], pattern
    with pytest.raises(RewardError, match="more than 100,000 parts after expansion of its counted repeats"):
        loaded({"regex": "((a{1000}){1000}){1000}"})


SLOW = r"(x+)(x+)(x+)\3\2\1y"  # for x's, whose number of ways to be divided is enormous
HANGS = """
import time

def score(completions):
    for text in completions:
        if text.startswith("x"):
            time.sleep(60)
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize("kind", ["regex", "extract", "function"])
def test_a_reward_that_hangs_ends_and_names_the_row(tmp_path: Path, kind: str) -> None:
    (tmp_path / "rewards.py").write_text(HANGS, encoding="utf-8")
    sources = {
        "regex": {"regex": SLOW},
        "extract": {"exact_match": "answer", "extract": SLOW},
        "function": {"function": f"{tmp_path}/rewards.py:score", "allow_code": True},
    }
    found = loaded(sources[kind] | {"limit_seconds": 0.2})
    completions = [Completion("p", {"answer": "7"}, "a" * 5, f"train.jsonl:{line}") for line in range(1, 9)]
    found.score(completions)
    completions[4] = replace(completions[4], text="x" * 1000)
    match = (
        r"took more than 0\.2 s for a completion of train\.jsonl:5; make the reward faster, or raise .*0\.limit_seconds"
    )
    with pytest.raises(RewardError, match=match):
        found.score(completions)


def test_completions_state_where_their_row_is_from() -> None:
    context = np.frombuffer(b'{"prompt": "p", "columns": {}}', np.uint8)
    row = Row({"context": context}, (1,), 1, "train.jsonl:3")
    (completion,) = completions_of([row], [[Sample([1], True, "text")]])
    assert completion == Completion("p", {}, "text", "train.jsonl:3")


def test_a_limit_is_for_code_alone(tmp_path: Path) -> None:
    assert loaded({"regex": "a"}).limit(0) == TRAINING_SECONDS
    with pytest.raises(ValueError, match="limit_seconds has no effect on a reward model"):
        rewards_of({"model": str(tmp_path), "limit_seconds": 3})


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("myreward.py", r"must be a list, not 'myreward.py'; write reward: \[\{function: FILE.py:NAME, allow_code"),
        (["myreward.py"], r"reward.0: must be a mapping, not 'myreward.py'; write reward: \[\{function: FILE.py:NAME"),
        ([{"path": "myreward.py"}], r"reward.0.path: unknown key; the keys here are: function"),
    ],
)
def test_a_reward_in_another_form_is_shown_the_right_one(tmp_path: Path, reward: object, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    values = {"model": "base", "data": {"train": "rows.jsonl"}, "output": {"dir": "out"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**values, "objective": {"method": "grpo", "reward": reward}}), encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe)
