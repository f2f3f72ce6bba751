"""The quickstart's data set keeps what it promises, and its committed files are what its script writes."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "recipes" / "data" / "orders"
ANSWER = re.compile(r"\w+ \| ([1-9]|1[0-2]) \| [a-z ]+ \| (Mon|Tue|Wed|Thu|Fri|Sat|Sun) \| (0[89]|1[0-8]):[03]0")


def read_rows(name: str) -> list[tuple[str, str]]:
    """(message, answer) of each row."""
    rows = [json.loads(line)["messages"] for line in (FOLDER / name).read_text("utf-8").splitlines()]
    assert all([turn["role"] for turn in row] == ["system", "user", "assistant"] for row in rows)
    return [(row[1]["content"], row[2]["content"]) for row in rows]


def test_the_committed_files_are_what_the_script_writes(tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "make_quickstart_data"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    others = ("preferences", "answers", "fifty", "fifty_test", "tags", "tags_test", "pairs", "pairs_test")
    others = (*others, "hours", "two_days", "searches")
    for name in ("train.jsonl", "test.jsonl", "days.jsonl", *(f"{name}.jsonl" for name in others)):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_the_committed_images_are_what_their_script_draws(tmp_path: Path) -> None:
    folder = REPOSITORY / "recipes" / "data" / "shape-questions"
    subprocess.run([sys.executable, str(REPOSITORY / "scripts" / "make_shape_questions"), str(tmp_path)], check=True)
    assert (tmp_path / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()
    images = sorted(folder.glob("*.png"))
    assert [image.name for image in images] == sorted(image.name for image in tmp_path.glob("*.png"))
    for image in images:
        with Image.open(image) as committed, Image.open(tmp_path / image.name) as drawn:
            assert committed.tobytes() == drawn.tobytes()


def test_nothing_of_the_test_rows_stands_in_training() -> None:
    train, test = read_rows("train.jsonl"), read_rows("test.jsonl")
    assert 120 <= len(train) + len(test) <= 300
    for column in (0, 1):
        assert not {row[column] for row in train} & {row[column] for row in test}


def test_no_answer_is_frequent() -> None:
    rows = read_rows("train.jsonl") + read_rows("test.jsonl")
    assert max(Counter(answer for _, answer in rows).values()) <= 0.03 * len(rows)


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_every_answer_has_the_one_form_and_follows_from_its_message(name: str) -> None:
    for message, answer in read_rows(name):
        assert ANSWER.fullmatch(answer)
        person, _, item, day, _ = answer.split(" | ")
        assert person in message
        assert day in message
        assert item.split()[0][:3].lower() in message.lower()


def test_test_rows_have_wordings_of_their_own() -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make_quickstart_data"))
    train, test = (set(script["lines"](script[name])) for name in ("TRAIN_WORDINGS", "TEST_WORDINGS"))
    assert not train & test
    closings = [max(re.split(r"\{\w+\}", wording), key=len).strip() for wording in sorted(test)]
    assert not [text for text in closings for message, _ in read_rows("train.jsonl") if text in message]
    assert all(any(text in message for text in closings) for message, _ in read_rows("test.jsonl"))
