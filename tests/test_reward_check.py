"""`tunekit reward check`: planted faults are found, and a sound reward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.objectives.test_dpo import train, write_recipe
from tests.objectives.test_grpo import write_prompts
from tests.test_cli import run
from tunekit import reward_check
from tunekit.errors import InputError, RewardError
from tunekit.machine import signals
from tunekit.recipe.load import load_recipe
from tunekit.reward_check import reward_check_verb


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


SOUND = "[float(said[0]['content'] == right) for said, right in zip(completions, answer)]"


def checked(base: Path, folder: Path, body: str, *, samples: int = 0, **objective: Any) -> tuple[int, dict[str, Any]]:
    code = f"import time\n\ndef letters(prompts, completions, answer, **columns):\n    {body}\n"
    recipe = write_prompts(folder, base, code=code, objective=objective)
    found = reward_check_verb(load_recipe(recipe), samples, str(folder / "found.json"))
    return found, json.loads((folder / "found.json").read_text("utf-8"))


def test_a_sound_reward_passes(base: Path, tmp_path: Path) -> None:
    code, found = checked(base, tmp_path, f"return {SOUND}", samples=32)
    assert (code, found["findings"]) == (0, [])
    worth = {each["answers"]: each["mean"] for each in found["answers"]}
    assert worth.pop("reference answers") == 1.0
    assert max(worth.values()) < 0.2
    sampled = found["answers"][-1]
    assert sampled["completions"] == 33, "whole groups of 3"
    assert sampled["not_judged"] == 0
    assert any("of the groups of samples have equal rewards" in note for note in found["notes"])


FAULTS = {
    "likes length": ("return [float(len(said[0]['content'])) for said in completions]", "200 words from other answers"),
    "likes the prompt": (
        "return [float(asked[-1]['content'] in said[0]['content']) for asked, said in zip(prompts, completions)]",
        "the prompt as the answer",
    ),
    "likes nothing": ("return [1.0 / (1 + len(said[0]['content'])) for said in completions]", "empty answers: a mean"),
    "likes one answer": (
        "return [float(said[0]['content'].startswith('7')) for said in completions]",
        "one answer for all rows: '7'",
    ),
    "is constant": ("return [0.5] * len(completions)", "empty answers: a mean reward of 0.5"),
    "likes the answer anywhere": (
        "return [float(right in said[0]['content']) for said, right in zip(completions, answer)]",
        "the reference answer among other answers: a mean",
    ),
    "likes a list of labels": (
        "return [float(right in said[0]['content'].split(', ')) for said, right in zip(completions, answer)]",
        "a list of all answers: a mean",
    ),
    "likes words of the prompt": (
        "return [0.4 * (said[0]['content'] == right) + 0.6 * (said[0]['content'] == right or 'say' in "
        "said[0]['content']) for said, right in zip(completions, answer)]",
        "the prompt five times: a mean reward of",
    ),
    "raises": ("return 1 / 0", "letters raised ZeroDivisionError"),
    "returns None": ("pass", "letters returned None"),
    "returns NaN": ("return [float('nan')] * len(completions)", "letters returned None or NaN for all"),
    "returns too few": ("return [1.0]", "letters returned 1 rewards for"),
    "takes a minute": ("time.sleep(60)", "letters took more than 0.2 s"),
    "takes a minute whatever happens": (
        "try:\n        time.sleep(60)\n    except Exception:\n        pass",
        "letters took more than 0.2 s",
    ),
    "takes a minute and catches everything": (
        "for said in completions:\n        try:\n            time.sleep(60)\n        except:\n            pass",
        "letters took more than 0.2 s",
    ),
    "is slow": (f"time.sleep(0.1); return {SOUND}", "s per completion"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_check, "LIMIT_SECONDS", 0.2)
    monkeypatch.setattr(reward_check, "SLOW_SECONDS", 0.003)
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0.05)
    rows = [
        {"prompt": [{"role": "user", "content": f"say {n}"}], "answer": "7" if n % 3 else str(n)} for n in range(12)
    ]
    body, said = FAULTS[fault]
    code = f"import time\n\ndef letters(prompts, completions, answer, **columns):\n    {body}\n"
    recipe = write_prompts(tmp_path, base, rows, code=code, data={"eval": None})
    assert reward_check_verb(load_recipe(recipe), 0, str(tmp_path / "found.json")) == 2
    findings = json.loads((tmp_path / "found.json").read_text("utf-8"))["findings"]
    assert any(said in finding for finding in findings), findings


@pytest.mark.parametrize("place", [0, -1])
def test_a_reward_that_reads_the_first_or_the_last_of_two_labels_is_sound(
    place: int, base: Path, tmp_path: Path
) -> None:
    """By chance half of the labels are right in a list, as in one answer for all rows."""
    rows = [{"prompt": f"say {n}", "answer": "yes" if n % 2 else "no"} for n in range(12)]
    code = (
        "import re\n\ndef letters(completions, answer):\n"
        "    found = [re.findall('yes|no', said) for said in completions]\n"
        f"    return [float(some[{place}:][:1] == [right]) for some, right in zip(found, answer)]\n"
    )
    recipe = write_prompts(tmp_path, base, rows, code=code, data={"eval": None})
    assert reward_check_verb(load_recipe(recipe), 0, str(tmp_path / "found.json")) == 0


def test_a_reward_that_reads_ids_gets_those_of_known_answers(base: Path, tmp_path: Path) -> None:
    code = (
        "def letters(completions, answer, **more):\n"
        "    return [float(len(ids) == 1 + len(right)) for ids, right in zip(more['completion_ids'], answer)]\n"
    )
    recipe = write_prompts(tmp_path, base, code=code, data={"eval": None})
    reward_check_verb(load_recipe(recipe), 0, str(tmp_path / "found.json"))
    answers = json.loads((tmp_path / "found.json").read_text("utf-8"))["answers"]
    assert answers[0]["mean"] == 1.0, "bytes and the end"
    assert not any(each["errors"] for each in answers)


def test_a_reward_that_the_others_hide_is_noted(base: Path, tmp_path: Path) -> None:
    """It compares a list of messages with a text, so that it is always 0."""
    mistaken = "return [float(said == right) for said, right in zip(completions, answer)]"
    rewards = [{"function": "rewards.py:letters", "allow_code": True}, {"exact_match": "answer"}]
    code, found = checked(base, tmp_path, mistaken, reward=rewards)
    assert code == 0
    assert [note for note in found["notes"] if "letters returns 0 for all answers" in note]
    code, found = checked(base, tmp_path, f"return {SOUND}", reward=rewards)
    assert not [note for note in found["notes"] if "for all answers" in note]


def test_one_failure_is_told_once(base: Path, tmp_path: Path) -> None:
    _, found = checked(base, tmp_path, "pass")
    (finding,) = [finding for finding in found["findings"] if "returned None" in finding]
    assert finding.endswith(
        "letters returned None; return a list with a number, or None, for each completion "
        "(reference answers, and 8 more kinds of answers)"
    )


def test_the_command_and_what_cannot_be_checked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_prompts(tmp_path, base, objective={"reward": [{"exact_match": "answer"}]})
    assert run(monkeypatch, "reward", "check", str(recipe), "--samples", "0") == 0
    assert "no problem was found" in capsys.readouterr().out
    with pytest.raises(InputError, match="objective dpo has no reward"):
        reward_check_verb(load_recipe(write_recipe(tmp_path / "dpo", base)), 0, None)
    broken = write_prompts(tmp_path / "broken", base, code="def other():\n    pass\n")
    with pytest.raises(RewardError, match="has no function letters; it has: other"):
        reward_check_verb(load_recipe(broken), 0, None)
    bare = write_prompts(tmp_path / "bare", base, [{"prompt": f"p{n}"} for n in range(4)])
    code, found = checked_again(bare)
    assert code == 2
    assert found["notes"][0] == "no row has a reference answer, so the reward was not compared with good answers"


def test_samples_are_those_of_the_adapter_that_is_continued(base: Path, tmp_path: Path) -> None:
    """And without samples neither the model nor its tokenizer is looked for."""
    recipe = write_prompts(tmp_path, base)
    texts = {}
    for name, overrides in (("plain", []), ("continued", [f"adapter.init_from={moved_adapter(tmp_path, base)}"])):
        written = reward_check._sampled(load_recipe(recipe, overrides).recipe, 4, torch.device("cpu"))
        texts[name] = [each.text for each in written]
    assert len(texts["plain"]) == 12
    assert texts["plain"] != texts["continued"]
    absent = ["model.name_or_path=someone/who-is-not-there"]
    assert reward_check_verb(load_recipe(recipe, absent), 0, str(tmp_path / "found.json")) in (0, 2)


def moved_adapter(folder: Path, base: Path) -> Path:
    """Of a run whose rate is absurd."""
    rate = {"learning_rate": 0.5, "max_steps": 3, "epochs": None}
    return train(write_prompts(folder / "before", base, training=rate, data={"eval": None})) / "adapter"


def checked_again(recipe: Path) -> tuple[int, dict[str, Any]]:
    found = reward_check_verb(load_recipe(recipe), 0, str(recipe.parent / "found.json"))
    return found, json.loads((recipe.parent / "found.json").read_text("utf-8"))


def test_without_answers_nothing_is_said_of_them(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def letters(completions):\n    return [float(len(said)) for said in completions]\n"
    recipe = write_prompts(tmp_path, base, [{"prompt": f"say {n}", "level": n} for n in range(8)], code=code)
    assert reward_check_verb(load_recipe(recipe), 0, None) == 0
    said = capsys.readouterr().out
    assert "it was not tested on good answers" in said
    assert "score higher" not in said
