"""Trials over a streamed base run through each layer together: each ends in the bytes of its own `tunekit train`."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.train_case import Ended, kill_self, records, train_in_child, without_times, write_recipe
from tests.test_sweep import at_save, results_of, sweep, weights
from tunekit.errors import NumericsError
from tunekit.files import durable
from tunekit.planning import trial_groups
from tunekit.recipe.reading.trial_recipes import load_sweep

KEYS = {"training.learning_rate": [0.01, 0.001], "adapter.method": ["lora", "dora"]}
LORA, DORA = (f"learning_rate=0.01,method={method}" for method in ("lora", "dora"))


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TUNEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return write_recipe(
        tmp_path_factory.mktemp("together"),
        tiny_llama,
        model={"quantization": "nf4", "dtype": "bfloat16"},
        memory={"streaming": "disk"},
        training={"epochs": None, "max_steps": 4},
        sweep={"keys": KEYS},
    )


class Solo:
    """The runs of trials by `tunekit train`, each made when it is needed."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.trials = {trial.name: trial.values for trial in load_sweep(str(recipe)).trials}

    def run(self, name: str) -> Path:
        if not (self.folder / name).exists():
            overrides = [f"{key}={value}" for key, value in self.trials[name].items()]
            ended = train_in_child(self.recipe, self.folder / name, *overrides)
            assert ended.code == 0, ended.output
        return self.folder / name


@pytest.fixture(scope="module")
def solo(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Solo:
    return Solo(recipe, tmp_path_factory.mktemp("solo"))


def assert_equal_to_solo(folder: Path, solo: Solo, *names: str) -> None:
    for name in names:
        assert weights(folder / name) == weights(solo.run(name)), name
        assert without_times(records(folder / name)) == without_times(records(solo.run(name))), name


def count_windows() -> None:
    """Makes a child print how many windows run together."""
    from tunekit.training import streaming

    run = streaming._run_groups

    def counted(attempts: Any, **named: Any) -> None:
        if len(attempts) > 1:
            print(f"windows together: {len(attempts)}")
        run(attempts, **named)

    streaming._run_groups = counted


def sizes_of(ended: Ended) -> list[int]:
    """How many windows ran together in each step."""
    lines = ended.output.splitlines()
    return [int(line.rpartition(" ")[2]) for line in lines if line.startswith("windows together")]


@pytest.mark.drawn
def test_trials_together_equal_their_solo_runs(recipe: Path, solo: Solo, tmp_path: Path) -> None:
    ended = sweep(recipe, tmp_path / "all", "training.learning_rate=0.01,0.02", before=count_windows)
    assert ended.code == 0, ended.output
    assert sizes_of(ended) == [4] * 4
    assert ended.output.count("loading ") == 1
    assert "4 trials run together: each layer of the streamed base is loaded and unpacked once" in ended.output
    assert f"{DORA}: step 4/4" in ended.output
    assert_equal_to_solo(tmp_path / "all", solo, LORA, DORA)


@pytest.mark.slow
def test_a_trial_that_ends_leaves_the_others_as_they_are(recipe: Path, solo: Solo, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    ended = sweep(recipe, folder, "training.learning_rate=1e38,0.01", before=count_windows)
    assert ended.code == 0, ended.output
    assert sizes_of(ended)[0] == 4
    assert sizes_of(ended)[-1] == 2
    for method in ("lora", "dora"):
        status = json.loads((folder / f"learning_rate=1e+38,method={method}" / "status.json").read_text())
        assert status["exit_code"] == NumericsError.exit_code
    assert_equal_to_solo(folder, solo, LORA, DORA)


@pytest.mark.slow
@pytest.mark.parametrize("action", [kill_self, lambda: os.kill(os.getpid(), signal.SIGINT)], ids=["kill", "interrupt"])
def test_trials_together_resume(action: Callable[[], Any], recipe: Path, solo: Solo, tmp_path: Path) -> None:
    """Ended in the middle of the first checkpoints: some trials have one, others do not. One continues alone."""
    folder = tmp_path / "all"
    ended = sweep(recipe, folder, before=at_save(1, action))
    assert ended.code == (-signal.SIGKILL if action is kill_self else 130), ended.output
    if action is not kill_self:  # every trial that had begun has saved its step
        assert all(list((folder / name / "checkpoints").iterdir()) for name in solo.trials)
    alone = train_in_child(folder / DORA / "recipe.yaml", folder / DORA, resume=True)
    assert alone.code == 0, alone.output
    resumed = sweep(recipe, folder, resume=True)
    assert resumed.code == 0, resumed.output
    assert_equal_to_solo(folder, solo, *solo.trials)


@pytest.mark.drawn
def test_a_full_folder_ends_only_its_trial(recipe: Path, solo: Solo, tmp_path: Path) -> None:
    folder = tmp_path / "all"

    def fill() -> None:
        perform = durable.perform

        def full(kind: str, path: Path, work: Callable[[], Any]) -> Any:
            if "method=dora" in str(path) and "step-000002" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return perform(kind, path, work)

        durable.perform = full

    ended = sweep(recipe, folder, "~sweep.keys.training.learning_rate", before=fill)
    assert ended.code == 4, ended.output
    assert weights(folder / "method=lora") == weights(solo.run(LORA))


@pytest.mark.drawn
def test_a_window_that_fails_together_runs_alone(recipe: Path, solo: Solo, tmp_path: Path) -> None:
    def lack_memory() -> None:
        from tunekit.training import streaming

        run = streaming._run_groups

        def failing(attempts: Any, **named: Any) -> None:
            run(attempts, **named)
            if len(attempts) > 1:
                raise MemoryError("not enough memory")

        streaming._run_groups = failing

    ended = sweep(recipe, tmp_path / "all", before=lack_memory)
    assert ended.code == 0, ended.output
    assert ended.output.count("the trials cannot run together (not enough memory)") == 1
    assert_equal_to_solo(tmp_path / "all", solo, LORA, DORA)


@pytest.mark.slow
def test_halving_of_trials_together(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    more = ("training.learning_rate=0,1e-4,1e-3,1e-2", "~sweep.keys.adapter.method", "sweep.strategy=halving")
    more += ("training.max_steps=8", "training.save_steps=8", "training.eval_steps=1")
    ended = sweep(recipe, folder, *more, before=count_windows)
    assert ended.code == 0, ended.output
    assert sizes_of(ended) == [4, 4, 2, 2]
    assert results_of(folder)["settings"][0]["runs"][0]["state"] == "finished"
    alone = train_in_child(recipe, tmp_path / "solo", "training.learning_rate=0.01", *more[3:])
    assert alone.code == 0, alone.output
    assert weights(folder / "learning_rate=0.01") == weights(tmp_path / "solo")


@pytest.mark.drawn
def test_trials_that_do_not_fit_into_memory_are_divided(recipe: Path, solo: Solo, tmp_path: Path) -> None:
    def lack_memory() -> None:
        count_windows()
        trial_groups._limit = lambda trial: 2  # type: ignore[assignment]
        trial_groups._peak_together = lambda members, *_: len(members)  # type: ignore[assignment]

    ended = sweep(recipe, tmp_path / "all", before=lack_memory)
    assert ended.code == 0, ended.output
    assert sizes_of(ended) == [2] * 8
    assert ended.output.count("loading ") == 1
    assert_equal_to_solo(tmp_path / "all", solo, LORA, DORA)
