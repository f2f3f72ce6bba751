"""Runs of several ranks in forked children of this process, and one small recipe for each objective."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.conftest import write_tiny_llama
from tests.support.train_case import Ended, end_of, free_port, records, start_child, write_recipe
from tunekit.recipe.load import load_recipe

TIME_LIMIT = 900  # seconds; a rank that waits for ever is ended
LAYERS = 4
REWARD = "def score(completions):\n    return [len(set(said)) for said in completions]\n"
MEASURED = {"seconds", "tokens_per_second", "peak_bytes", "threads"}


def train_in_ranks(
    recipe: Path,
    run: Path,
    *overrides: str,
    world: int = 2,
    resume: bool = False,
    dry_run: bool = False,
    before: Callable[[], None] = lambda: None,
) -> list[Ended]:
    """`tunekit train RECIPE output.dir=RUN OVERRIDES [--resume]` on `world` ranks; one Ended for each rank."""
    port = free_port()
    words = [f"output.dir={run}", *overrides]

    def join(rank: int) -> None:
        from accelerate.state import PartialState

        PartialState._reset_state()  # type: ignore[no-untyped-call]
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items() if world > 1})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TUNEKIT_DEVICE": "cpu"}
        signal.alarm(TIME_LIMIT)
        before()

    def work() -> None:
        from tunekit.train import train_verb

        train_verb(load_recipe(recipe, words), resume, dry_run)

    run.parent.mkdir(parents=True, exist_ok=True)
    logs = [run.parent / f"{run.name}.{rank}.log" for rank in range(world)]
    children = [start_child(work, log, partial(join, rank)) for rank, log in enumerate(logs)]
    return [end_of(child, log) for child, log in zip(children, logs, strict=True)]


def stop_at(step: int | None) -> None:
    """In a rank's process: on the last rank only, a signal stops the run after `step`."""
    from tunekit.training.session import Session

    rank, world = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))
    ours = Session.stop_signal

    def signalled(self: Session, at: int) -> int:
        return signal.SIGTERM if rank == str(world - 1) and at == step else ours(self, at)

    Session.stop_signal = signalled  # type: ignore[method-assign]


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of each number in the records of two runs. Sampled texts must be equal."""
    first, second = records(one), records(other)
    assert len(first) == len(second)
    largest: dict[str, float] = {}
    for left, right in zip(first, second, strict=True):
        mine, theirs = dict(_numbers(left)), dict(_numbers(right))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            largest[name] = max(largest.get(name, 0.0), abs(value - theirs[name]))
    return largest


def _numbers(values: dict[str, Any], prefix: str = "") -> Any:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and name not in MEASURED:
            yield f"{prefix}{name}", float(value)


def write_case(objective: str, folder: Path, shared: Path) -> Path:
    """A small recipe of this objective in `folder`, with an uneven number of rows. Returns its path."""
    model = shared / "models" / "bart-g2p" if objective == "seq2seq" else write_tiny_llama(folder / "m", layers=LAYERS)
    steps = {"training": {"gradient_accumulation_steps": 5, "epochs": 1.0, "eval_steps": 2, "save_steps": 2}}
    recipe = write_recipe(folder, model, adapter={"dropout": 0.0}, **steps)
    values = json.loads(recipe.read_text("utf-8"))
    values["objective"] = {"method": objective}
    rows: list[dict[str, Any]] = []
    if objective == "dpo":
        rows = [{"prompt": f"say {n}\n", "chosen": "so " * (1 + n % 5), "rejected": f"x{n}"} for n in range(23)]
    elif objective == "classify":
        rows = [{"text": f"order {'very ' * (n % 4)}{n}", "label": ("odd", "even", "new")[n % 3]} for n in range(23)]
        values["evaluation"] = {"metrics": ["loss", "accuracy"]}
    elif objective == "seq2seq":
        rows = [{"prompt": "WORD"[: 1 + n % 4], "completion": "abcde"[: 1 + n % 5]} for n in range(23)]
    elif objective == "grpo":
        rows = [{"prompt": f"say {'very ' * (n % 4)}{n}", "answer": str(n)} for n in range(13)]
        (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
        values["objective"] |= {"reward": [{"function": "rewards.py:score", "allow_code": True}], "beta": 0.1}
        values["objective"] |= {"num_generations": 3, "max_completion_length": 6, "num_iterations": 2}
        values["data"] |= {"eval": None}
        values["training"] |= {"micro_batch_size": 1}
    if rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    recipe.write_text(json.dumps(values), encoding="utf-8")
    return recipe
