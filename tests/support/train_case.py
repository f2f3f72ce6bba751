"""Whole runs of `tunekit train` in forked children of this process, which has imported torch already."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunekit.errors import TunekitError
from tunekit.recipe.load import load_recipe


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
        train(recipe, f"output.dir={run}", *overrides, resume=resume)

    return in_child(work, run.parent / f"{run.name}.log", before)


def train(recipe: Path, *overrides: str, resume: bool = False) -> Path:
    """Train in this process, and return the run's folder."""
    from tunekit.train import train_verb

    loaded = load_recipe(recipe, overrides)
    train_verb(loaded, resume, False)
    return Path(loaded.recipe.output.dir)


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
    return write_sections(folder, values, sections)


def write_sections(folder: Path, values: dict[str, Any], sections: Mapping[str, Any]) -> Path:
    """A recipe of these values, in which `sections` replace values of the same name, or some keys of a section."""
    for name, section in sections.items():
        written = values.get(name, {})
        values[name] = {**written, **section} if isinstance(section, dict) and isinstance(written, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def result_bytes(run: Path) -> dict[str, bytes]:
    """The exported adapter, byte for byte."""
    return {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}


def tensors_of(run: Path) -> bytes:
    """The file of the exported adapter's tensors."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def lose_the_end(run: Path) -> None:
    """Leave of a finished run what one has that was killed after its last checkpoint but one."""
    (run / "status.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    shutil.rmtree(run / "adapter")


def check_a_resume(recipe: Path, *overrides: str) -> None:
    """A run that is resumed ends with the losses and the adapter of the run that was not interrupted."""
    whole, cut = (train(recipe, *overrides, f"output.dir={recipe.parent / name}") for name in ("whole", "cut"))
    lose_the_end(cut)
    train(recipe, *overrides, f"output.dir={cut}", resume=True)
    assert losses(cut) == losses(whole)
    assert result_bytes(cut) == result_bytes(whole)


def check_streamed(recipe: Path, tier: str) -> None:
    """A run whose base is streamed from the tier ends with the losses and the adapter of the resident run."""
    resident = train(recipe, f"output.dir={recipe.parent / 'resident'}")
    streamed = train(recipe, f"memory.streaming={tier}", f"output.dir={recipe.parent / 'streamed'}")
    assert losses(streamed) == losses(resident)
    assert tensors_of(streamed) == tensors_of(resident)


def free_port() -> int:
    """A port that no program uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def kill_self() -> None:
    """SIGKILL: nothing after it runs, no handler, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    return [record["loss"] for record in records(run) if "loss" in record]


def without_times(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock or the memory gave."""
    measured = {"seconds", "tokens_per_second", "peak_bytes"}
    return [{key: value for key, value in entry.items() if key not in measured} for entry in entries]
