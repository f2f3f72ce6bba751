"""Whole runs of `tunekit train` in forked children of this process, which has imported torch already."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunekit.errors import TunekitError
from tunekit.recipe.load import load_recipe

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "tunekit.json")


@dataclass(frozen=True)
class Ended:
    """How a child ended: `code` as a shell sees it (negative: killed by that signal), and what it printed."""

    code: int
    output: str


def in_child(work: Callable[[], None], log: Path, before: Callable[[], None] = lambda: None) -> Ended:
    """Run `work` in a forked child whose output goes to `log`."""
    return end_of(start_child(work, log, before), log)


def start_child(work: Callable[[], None], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start `work` in a forked child whose output goes to `log`. Returns the child's process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os._exit(_exit_code(work, before))
    return child


def end_of(child: int, log: Path) -> Ended:
    """Wait until the child ends."""
    status = os.waitpid(child, 0)[1]
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace"))


def _exit_code(work: Callable[[], None], before: Callable[[], None]) -> int:
    code = 0
    try:
        torch.set_num_threads(1)
        before()
        work()
    except TunekitError as error:
        code = error.exit_code
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def train_in_child(
    recipe: Path,
    run: Path,
    *overrides: str,
    resume: bool = False,
    before: Callable[[], None] = lambda: None,
) -> Ended:
    """`tunekit train RECIPE output.dir=RUN OVERRIDES [--resume]`; `before` runs in the child first."""

    def work() -> None:
        from tunekit.train import train_verb

        train_verb(load_recipe(recipe, [f"output.dir={run}", *overrides]), resume, False)

    return in_child(work, run.parent / f"{run.name}.log", before)


def write_recipe(folder: Path, model: Path, /, rows: int = 23, **sections: dict[str, Any]) -> Path:
    """A recipe over `rows` chat rows of different lengths, in `folder`; sections override these."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            question = f"say {'very ' * (number % 5)}{number}"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "so " * (number % 7) + str(number)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}], "eval": 0.2, "max_length": 128, "packing": False},
        "adapter": {"method": "lora", "r": 4, "dropout": 0.1},
        "training": {
            "learning_rate": 0.01,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "epochs": 2.0,
            "save_steps": 2,
            "eval_steps": 3,
            "keep_checkpoints": 1,
        },
        "output": {"dir": "run"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def result_bytes(run: Path) -> dict[str, bytes]:
    """The exported adapter, byte for byte."""
    return {name: (run / "adapter" / name).read_bytes() for name in ADAPTER_FILES}


def lose_the_end(run: Path) -> None:
    """Leave of a finished run what one has that was killed after its last checkpoint but one."""
    (run / "status.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    shutil.rmtree(run / "adapter")


def kill_self() -> None:
    """SIGKILL: nothing after it runs, no handler, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock or the memory gave."""
    measured = {"seconds", "tokens_per_second", "peak_bytes"}
    return [{key: value for key, value in entry.items() if key not in measured} for entry in entries]
