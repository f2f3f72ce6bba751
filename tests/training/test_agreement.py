"""What ranks compare before the first step, without a second process: the other rank's values are made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.train_case import write_recipe
from tunekit.errors import InputError
from tunekit.planning import kernels
from tunekit.planning.ranks import plan_session
from tunekit.recipe.load import load_recipe
from tunekit.training.ranks import check_command, check_fingerprints, check_folder_is_shared
from tunekit.training.session import Session

PRINT = {"recipe": {}, "data": "a", "base": "b", "versions": {}, "device": "cpu", "accelerator": None, "threads": 1}
Change = Callable[[Any], Any]


class TwoRanks:
    """Rank 0 of two. `change` makes the other rank's value from this rank's."""

    world, rank, device = 2, 0, torch.device("cpu")

    def __init__(self, change: Change) -> None:
        self.change = change

    def name(self, rank: int) -> str:
        return f"rank {rank} (on node-{rank})"

    def gather(self, values: list[Any]) -> list[Any]:
        return [*values, self.change(values[0])]

    def from_main(self, value: Any) -> Any:
        return value

    def main_first(self, make: Callable[[], Any]) -> Any:
        return make()


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Change], tuple[Session, list[str]]]:
    """A session of rank 0, and its warnings."""
    loaded = load_recipe(write_recipe(tmp_path, Path("base")), [])

    def session(change: Change) -> tuple[Session, list[str]]:
        warnings: list[str] = []
        console: Any = SimpleNamespace(warn=warnings.append)
        devices: Any = TwoRanks(change)
        signals: Any = None
        return Session(loaded, devices, console, signals), warnings

    return session


def test_a_key_that_differs_is_named(make: Any) -> None:
    def other(value: Any) -> Any:
        return value + 3600 if isinstance(value, float) else {**value, "training.seed": 7, "--resume": True}

    with pytest.raises(InputError) as caught:
        check_command(make(other)[0], {"--resume": False})
    first, second = map(str, caught.value.problems)
    assert first.startswith("training.seed: 7 on rank 1 (on node-1), but 0 on rank 0 (on node-0);"), first
    assert second.startswith("--resume: True on rank 1 (on node-1), but False on rank 0 (on node-0);"), second


def test_a_moved_file_is_no_difference_and_a_wrong_clock_is_a_warning(make: Any) -> None:
    def other(value: Any) -> Any:
        return value + 3600 if isinstance(value, float) else {**value, "data.train.0.path": "/node-1/train.jsonl"}

    session, warnings = make(other)
    check_command(session, {"--resume": False})
    assert len(warnings) == 1
    assert "the clock of rank 1 (on node-1) differs by +3,600 seconds" in warnings[0]


def test_a_file_that_differs_is_named(make: Any) -> None:
    def other(value: Any) -> Any:
        changed = {"data": "other", "data.train.0.path": ["/node-1/train.jsonl", "0"]}
        return {**value, **{key: changed[key] for key in value if key in changed}}

    with pytest.raises(InputError, match=r"/node-1/train.jsonl: data.train.0.path: the file of rank 1 \(on node-1\)"):
        check_fingerprints(make(other)[0], json.loads(json.dumps(PRINT)))


def test_one_of_several_files_that_differs_or_is_missing_is_named(make: Any, tmp_path: Path) -> None:
    data = tmp_path / "d"
    data.mkdir()
    for name in ("a", "b"):
        (data / f"{name}.jsonl").write_text("{}")

    def other(value: Any) -> Any:
        if "data" in value:
            return {**value, "data": "other"}
        place, gone = "data.train.0.path a.jsonl", "data.train.0.path b.jsonl"
        return {**{key: each for key, each in value.items() if key != gone}, place: ["/node-1/a.jsonl", "0"]}

    for train in (data, data / "*.jsonl"):
        session = make(other)[0]
        session.loaded = load_recipe(write_recipe(tmp_path, Path("base")), [f"data.train={train}"])
        with pytest.raises(InputError) as caught:
            check_fingerprints(session, json.loads(json.dumps(PRINT)))
        first, second = map(str, caught.value.problems)
        assert "/node-1/a.jsonl: data.train.0.path: the file of rank 1 (on node-1) differs" in first
        assert "d/b.jsonl: data.train.0.path: rank 0 (on node-0) has this file, but not rank 1 (on node-1)" in second


def test_another_base_and_another_number_of_threads(make: Any) -> None:
    with pytest.raises(InputError, match=r"model: the base model's files differ on rank 1 \(on node-1\)"):
        check_fingerprints(make(lambda value: {**value, "base": "c"} if "base" in value else value)[0], {**PRINT})
    session, warnings = make(lambda value: {**value, "threads": 4})
    check_fingerprints(session, {**PRINT})
    assert "rank 1 (on node-1) has 4 threads, but rank 0 (on node-0) 1" in warnings[0]


def test_a_rank_that_does_not_see_the_run_folder_is_named(make: Any, tmp_path: Path) -> None:
    session, warnings = make(lambda value: False)
    check_folder_is_shared(session, tmp_path / "run")
    assert f"output.dir: {tmp_path / 'run'} of rank 0 (on node-0) is not visible on rank 1 (on node-1)" in warnings[0]


def test_kernels_that_another_machine_lacks_are_not_used(
    make: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)  # this machine has a C compiler
    recipe = write_recipe(tmp_path, tiny_llama, model={"dtype": "bfloat16"}, training={"kernels": "auto"})
    for other, used in (("native", "native"), ("none", "none")):
        session = make(lambda choice, other=other: {**choice, "kernels": other})[0]
        session.loaded = load_recipe(recipe, [])
        assert plan_session(session)[0].choice.kernels == used
