"""Killed anywhere and resumed, a run ends in the same bytes as one that was never interrupted."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.train_case import (
    Ended,
    kill_self,
    records,
    result_bytes,
    train_in_child,
    without_times,
    write_recipe,
)
from tunekit.files import durable

Event = tuple[str, str]


class Watched:
    """Stands in for durable.perform in a child: notes every event, and at one of them does `action`."""

    def __init__(self, events: Path, at: int | None = None, action: Callable[[], Any] = kill_self) -> None:
        self.events, self.at, self.action = events, at, action
        self.count = 0

    def install(self) -> None:
        self.events.write_text("")
        durable.perform = self.perform

    def perform(self, kind: str, path: Path, work: Callable[[], Any]) -> Any:
        self.count += 1
        if self.count - 1 == self.at:
            self.action()
        with self.events.open("a") as file:
            file.write(f"{kind}\t{path}\n")
        return work()


def events_of(path: Path) -> list[Event]:
    return [(line.split("\t")[0], line.split("\t")[1]) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TUNEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return write_recipe(tmp_path_factory.mktemp("kill"), tiny_llama, evaluation={"best": "eval.loss"})


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """The run that nothing interrupts, and what it did to the disk."""
    run = tmp_path_factory.mktemp("whole") / "run"
    watched = Watched(run.parent / "events.txt")
    ended = train_in_child(recipe, run, before=watched.install)
    assert ended.code == 0, ended.output
    return run, events_of(watched.events)


def interrupted(recipe: Path, run: Path, at: int, action: Callable[[], Any] = kill_self) -> Ended:
    shutil.rmtree(run, ignore_errors=True)
    watched = Watched(run.parent / "events.txt", at, action)
    return train_in_child(recipe, run, before=watched.install)


def assert_resumes_to(recipe: Path, run: Path, whole: Path) -> None:
    ended = train_in_child(recipe, run, resume=True)
    assert ended.code == 0, ended.output
    assert result_bytes(run) == result_bytes(whole)
    assert without_times(records(run)) == without_times(records(whole))
    left = sorted(entry.name for entry in (run / "checkpoints").iterdir())
    assert left == sorted(entry.name for entry in (whole / "checkpoints").iterdir())


def moments(events: list[Event]) -> dict[str, list[int]]:
    """Event numbers by what was going on: a save, a rotation (removing what was renamed away), the export, the rest."""
    first_step = next(number for number, (_, path) in enumerate(events) if path.endswith("metrics.jsonl"))
    groups: dict[str, list[int]] = {"save": [], "rotation": [], "export": [], "rest": []}
    for number in range(first_step, len(events)):
        path = events[number][1]
        if "/.deleting-" in path:
            groups["rotation"].append(number)
        elif "/checkpoints" in path:
            groups["save"].append(number)
        elif "adapter" in path:
            groups["export"].append(number)
        else:
            groups["rest"].append(number)
    return groups


@pytest.mark.drawn
@pytest.mark.parametrize(
    "moments_of",
    [
        {"save": 2, "rotation": 1, "rest": 1, "export": 1},
        pytest.param({"save": 8, "rotation": 3, "rest": 5, "export": 4}, marks=pytest.mark.slow),
    ],
    ids=["five", "twenty"],
)
def test_killed_at_some_moments(
    recipe: Path, whole: tuple[Path, list[Event]], tmp_path: Path, moments_of: dict[str, int]
) -> None:
    run, events = whole
    groups = moments(events)
    seed = 20
    print(f"seed {seed}")
    draw = random.Random(seed)
    for number in sorted(each for group, count in moments_of.items() for each in draw.sample(groups[group], count)):
        ended = interrupted(recipe, tmp_path / "run", number)
        assert ended.code == -signal.SIGKILL, (events[number], ended.output)
        assert_resumes_to(recipe, tmp_path / "run", run)


@pytest.mark.drawn
@pytest.mark.parametrize("evaluation", [1, 2])
def test_killed_in_an_evaluation(
    recipe: Path, whole: tuple[Path, list[Event]], tmp_path: Path, evaluation: int
) -> None:
    def before() -> None:
        from tunekit.objectives.losses import logprobs

        calls = {"evaluations": 0}
        scored = logprobs.scored_positions

        def scored_or_killed(*arguments: Any) -> Any:
            calls["evaluations"] += 1
            if calls["evaluations"] == evaluation:
                kill_self()
            return scored(*arguments)

        logprobs.scored_positions = scored_or_killed

    ended = train_in_child(recipe, tmp_path / "run", before=before)
    assert ended.code == -signal.SIGKILL, ended.output
    assert_resumes_to(recipe, tmp_path / "run", whole[0])


@pytest.mark.slow
def test_killed_at_every_event_of_one_save(recipe: Path, whole: tuple[Path, list[Event]], tmp_path: Path) -> None:
    run, events = whole
    own = [number for number, (_, path) in enumerate(events) if "step-000004" in path and "/.deleting-" not in path]
    inside = range(own[0], own[-1] + 2)  # the parent folder's flush comes last
    assert {"write", "fsync", "rename"} <= {events[number][0] for number in inside}
    for number in inside:
        ended = interrupted(recipe, tmp_path / "run", number)
        assert ended.code == -signal.SIGKILL, (events[number], ended.output)
        assert_resumes_to(recipe, tmp_path / "run", run)


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
    ids=["term", "int", "hup", "usr1"],
)
def test_a_stop_signal_saves_and_the_resume_is_exact(
    recipe: Path, whole: tuple[Path, list[Event]], tmp_path: Path, number: int, code: int
) -> None:
    run, events = whole
    at = [index for index, (_, path) in enumerate(events) if path.endswith("metrics.jsonl")][4]
    ended = interrupted(recipe, tmp_path / "run", at, lambda: os.kill(os.getpid(), number))
    assert ended.code == code, ended.output
    assert "--resume" in ended.output
    assert "Traceback" not in ended.output
    assert_resumes_to(recipe, tmp_path / "run", run)


@pytest.mark.drawn
def test_twice_interrupted(recipe: Path, whole: tuple[Path, list[Event]], tmp_path: Path) -> None:
    run, events = whole
    lines = [index for index, (_, path) in enumerate(events) if path.endswith("metrics.jsonl")]
    first = interrupted(recipe, tmp_path / "run", lines[2], lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert first.code == 143
    watched = Watched(tmp_path / "events.txt", lines[6], kill_self)
    second = train_in_child(recipe, tmp_path / "run", resume=True, before=watched.install)
    assert second.code in (-signal.SIGKILL, 0)
    assert_resumes_to(recipe, tmp_path / "run", run)
