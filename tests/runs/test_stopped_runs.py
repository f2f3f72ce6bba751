"""Runs that are stopped at random times, by max_minutes, SIGTERM and SIGKILL. Each is evaluated, merged and exported by
its plain name, and continued: it ends with the bytes of a run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.ranks_case import train_in_ranks, write_case
from tests.support.train_case import Ended, in_child, records, result_bytes, train_in_child
from tunekit.recipe.reading.trial_recipes import load_sweep

STEP_SECONDS = 0.2  # that a step lasts longer, so that a limit of seconds ends the run in the middle
SPARE_SECONDS = 0.5  # to start and to end a process
STEPS = ["~training.epochs", "training.max_steps=16", "training.save_steps=4", "training.eval_steps=5"]
SWEPT = "training.learning_rate=0.01,0.02"
KINDS = {
    "sft": ("sft", ["evaluation.best=eval.loss"]),
    "dpo": ("dpo", []),
    "classify": ("classify", ["evaluation.best=eval.accuracy"]),
    "grpo": ("grpo", []),  # two steps have the same samples
    "streamed": ("sft", ["memory.streaming=host"]),
    "ranks": ("sft", []),
    "sweep": ("sft", [SWEPT]),
}
CELLS = [(kind, way) for kind in KINDS for way in ("max_minutes", "SIGTERM", "SIGKILL")]


@dataclass(frozen=True)
class Case:
    """A recipe with the overrides of its kind."""

    kind: str
    recipe: Path
    words: list[str]

    def run_folder(self, name: str) -> Path:
        """The folder of the run: of a sweep, its first trial."""
        folder = self.recipe.parent / name
        return folder / "learning_rate=0.01" if self.kind == "sweep" else folder

    def train(self, name: str, *more: str, resume: bool = False, before: Callable[[], None] = lambda: None) -> Ended:
        """Train in children of this process; returns how the main rank ended."""
        folder, words = self.recipe.parent / name, [*self.words, *more]
        if self.kind == "ranks":
            return train_in_ranks(self.recipe, folder, *words, resume=resume, before=before)[0]
        if self.kind != "sweep":
            return train_in_child(self.recipe, folder, *words, resume=resume, before=before)

        def sweep() -> None:
            from tunekit.sweep import sweep_verb

            sweep_verb(load_sweep(self.recipe, [f"output.dir={folder}", *words]), resume, None)

        return in_child(sweep, self.recipe.parent / f"{name}.log", before)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Makes the case of a kind, with its run that is never stopped, in the folder `whole`."""

    @cache
    def make(kind: str) -> Case:
        objective, words = KINDS[kind]
        folder = tmp_path_factory.mktemp(kind)
        case = Case(kind, write_case(objective, folder, folder), [*STEPS, *words])
        ended = case.train("whole")
        assert ended.code == 0, ended.output
        return case

    return make


def slow_steps() -> None:
    """In a child: each step lasts longer."""
    from tunekit.training.run import Run

    finish = Run.finish_step

    def slower(run: Run, *values: object) -> None:
        time.sleep(STEP_SECONDS)
        finish(run, *values)  # type: ignore[arg-type]

    Run.finish_step = slower  # type: ignore[method-assign]


def signal_at(number: int, step: int) -> Callable[[], None]:
    """In a child: the process sends itself a signal in the middle of a step."""

    def before() -> None:
        from tunekit.training.run import Run

        finish = Run.finish_step

        def signalled(run: Run, *values: object) -> None:
            if run.state.step + 1 == step and (number == signal.SIGKILL or os.environ.get("RANK", "1") == "1"):
                os.kill(os.getpid(), number)
            finish(run, *values)  # type: ignore[arg-type]

        Run.finish_step = signalled  # type: ignore[method-assign]

    return before


def command(words: list[str], log: Path) -> Ended:
    """Run a command in a child."""

    def work() -> None:
        from tunekit.cli import app

        try:
            app(words)
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(ended.code or 0))

    return in_child(work, log)


def limit_of(case: Case, share: float) -> float:
    """A limit in seconds that is reached after about this share of the steps."""
    run = case.run_folder("whole")
    report = json.loads((run / "report.json").read_text())
    seconds, steps = sum(report["seconds"].values()), report["final_step"]
    other = report["starts"][0]["minutes"] * 60 - report["seconds"]["train"]
    assert seconds > 0
    return float(max(other, 0.3) + 1.5 + share * (report["seconds"]["train"] + steps * STEP_SECONDS))


@pytest.mark.parametrize(("kind", "way"), [pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS])
def test_a_stopped_run_is_used_and_continued(
    kind: str, way: str, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    case, draw = case_of(kind), random.Random(f"{kind} {way}")
    name = f"stopped-{way}"
    if way == "max_minutes":
        stop_by_time(case, name, draw.uniform(0.25, 0.6))
    else:
        number, step = signal.Signals[way], draw.randint(6, 14)
        ended = case.train(name, before=signal_at(number, step))
        assert ended.code == (128 + number if way == "SIGTERM" else -number), ended.output
    run = case.run_folder(name)
    use(run, way, tmp_path)
    ended = case.train(name, *(["training.max_minutes=60"] if way == "max_minutes" else []), resume=True)
    assert ended.code == 0, ended.output
    assert json.loads((run / "status.json").read_text())["finished"] is True
    assert result_bytes(run) == result_bytes(case.run_folder("whole"))


def stop_by_time(case: Case, name: str, share: float) -> None:
    """Train until the limit; the run ends in time, or late by one step, or by the steps that reuse samples."""
    limit, started = limit_of(case, share), time.monotonic()
    ended = case.train(name, f"training.max_minutes={limit / 60}", before=slow_steps)
    wall = time.monotonic() - started
    assert ended.code == 0, ended.output
    run = case.run_folder(name)
    report, status = (json.loads((run / f"{each}.json").read_text()) for each in ("report", "status"))
    assert (status["reason"].partition(";")[0], status["finished"]) == ("stopped_by_time", False), ended.output
    own = report["starts"][0]["minutes"] * 60
    over = (own if case.kind == "sweep" else wall) - limit  # a sweep has more than this trial
    longest = max(each["seconds"] for each in records(run) if "seconds" in each)
    steps = 2 if case.kind == "grpo" else 1
    print(f"{case.kind}: limit {limit:.1f} s, {report['final_step']} of 16 steps, over by {over:+.2f} s, ", end="")
    print(f"longest step {longest:.2f} s, export {report['seconds']['export']:.3f} s")
    assert over <= steps * longest + SPARE_SECONDS
    assert 0 < report["final_step"] < 16


def use(run: Path, way: str, tmp_path: Path) -> None:
    """Evaluate, merge and export the run by its plain name."""
    why = (
        "killed"
        if way == "SIGKILL"
        else "stopped by training.max_minutes"
        if way == "max_minutes"
        else f"stopped by {way}"
    )
    outputs = {
        "merge": ["--output", str(tmp_path / "merged")],
        "export": ["--to", "hub", "--output", str(tmp_path / "hub")],
    }
    verbs = ["merge", "export", *(["eval"] if (run / "evaluation_rows.json").exists() else [])]  # GRPO has no such rows
    for verb in verbs:
        ended = command([verb, str(run), *outputs.get(verb, [])], tmp_path / "command.log")
        assert ended.code == 0, ended.output
        assert f"of 16, {why}" in " ".join(ended.output.split()), ended.output
