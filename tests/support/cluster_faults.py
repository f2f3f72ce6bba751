"""Faults of a cluster, planted into runs of two processes (two_nodes.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.faulty_disk import FaultyDisk
from tests.support.train_case import free_port
from tests.support.two_nodes import Node, Plant, checkpoints, message, run_nodes, write_nodes
from tunekit.files import durable


@dataclass(frozen=True)
class Fault:
    """`plant` runs in each process before tunekit. `says`: texts in the output of any rank. `codes`: of rank 0 and 1,
    -9 for a killed one. `resumes`: the run can continue from a checkpoint."""

    name: str
    plant: Plant
    says: tuple[str, ...]
    codes: tuple[int, int]
    resumes: bool = False
    around: Callable[[Path, int], contextlib.AbstractContextManager[None]] = field(
        default=lambda case, port: contextlib.nullcontext()
    )


def on_rank(rank: int, change: Plant) -> Plant:
    """A plant that changes one rank only."""
    return lambda node: change(node) if node.rank == rank else None


def says(*words: str) -> Plant:
    return lambda node: node.words.extend(words)


def sets(**variables: str) -> Plant:
    return lambda node: node.variables.update(variables)


def own_folder(node: Node) -> None:
    node.words[2] = "output.dir=run"


def without_file(name: str) -> Plant:
    def change(node: Node) -> None:
        path = node.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def other_row(node: Node) -> None:
    path = node.folder / "train.jsonl"
    path.write_text(path.read_text().replace("say very very 7", "say very very 8"))


def other_weights(node: Node) -> None:
    from tests.conftest import write_tiny_llama

    shutil.rmtree(node.folder / "base")
    write_tiny_llama(node.folder / "base", seed=1)


def other_version(package: str) -> Plant:
    def change(node: Node) -> None:
        from tunekit.machine import meeting
        from tunekit.training import run_files

        versions = meeting.library_versions
        meeting.library_versions = run_files.library_versions = lambda: {**versions(), package: "0.0.1"}

    return change


def later_clock(node: Node) -> None:
    now = time.time
    time.time = lambda: now() + 3600


def other_threads(node: Node) -> None:
    torch.set_num_threads(2)


def full_disk(node: Node) -> None:
    durable.perform = FaultyDisk(0, "fail", forever=True).perform


def at_step(step: int, action: Plant) -> Plant:
    """A plant that acts before the step after `step`."""

    def change(node: Node) -> None:
        from tunekit.training.run import Run

        begin_step = Run.begin_step

        def acting(run: Any, window: Any) -> Any:
            if run.state.step == step:
                node.strike()
                action(node)
            return begin_step(run, window)

        Run.begin_step = acting

    return change


def sends(number: int) -> Plant:
    return lambda node: os.kill(os.getpid(), number)


def raises(error: BaseException) -> Plant:
    def action(node: Node) -> None:
        raise error

    return action


def hangs(node: Node) -> None:
    while True:
        time.sleep(1)


def not_finite(node: Node) -> None:
    from tunekit.objectives.losses.tokens import TokenLoss

    loss = TokenLoss.loss

    def broken(self: Any, output: Any, batch: Any) -> Any:
        value = loss(self, output, batch)
        value.total.data.fill_(float("nan"))
        return value

    TokenLoss.loss = broken


def at_evaluation(action: Plant) -> Plant:
    """A plant that acts in the middle of the evaluation after step 4."""

    def change(node: Node) -> None:
        from tunekit.evaluation import scores
        from tunekit.training.run import Run

        measure, evaluate, steps = scores._sums_in_parts, Run._evaluate_if_due, [0]

        def at(run: Any) -> Any:
            steps.append(run.state.step)
            return evaluate(run)

        def acting(*values: Any) -> Any:
            if steps[-1] == 4:
                node.strike()
                action(node)
            return measure(*values)

        Run._evaluate_if_due, scores._sums_in_parts = at, acting

    return change


def while_saving(action: Plant) -> Plant:
    """A plant that acts in rank 0 when the tensors of step 4 are on the disk."""

    def change(node: Node) -> None:
        rename = durable.rename

        def acting(source: Path, target: Path) -> Any:
            if "step-000004" in str(target):
                node.strike()
                action(node)
            return rename(source, target)

        durable.rename = acting

    return change


def before_tunekit(code: int) -> Plant:
    def change(node: Node) -> None:
        time.sleep(1)
        node.strike()
        os._exit(code)

    return change


@contextlib.contextmanager
def listening(case: Path, port: int) -> Iterator[None]:
    """A program that uses the port of the run."""
    with socket.socket() as listener:
        listener.bind(("", port))
        listener.listen()
        yield


@contextlib.contextmanager
def locked(case: Path, port: int) -> Iterator[None]:
    """Another run in the folder, on this machine."""
    from tunekit.files.lock import FolderLock

    (case / "run").mkdir()
    lock = FolderLock(case / "run")
    yield
    lock.release()


@contextlib.contextmanager
def locked_elsewhere(case: Path, port: int) -> Iterator[None]:
    """Another run in the folder, on another machine, whose lock this machine does not see."""
    from tunekit.files.lock import LOCK_NAME

    (case / "run").mkdir()
    path, ended = case / "run" / LOCK_NAME, threading.Event()
    path.write_text("4242\nnode-7\n")

    def touch() -> None:
        while not ended.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    yield
    ended.set()
    thread.join()


@contextlib.contextmanager
def stale_lock(case: Path, port: int) -> Iterator[None]:
    """The lock of a run on another machine, which was killed."""
    from tunekit.files.lock import LOCK_NAME

    (case / "run").mkdir()
    (case / "run" / LOCK_NAME).write_text("4242\nnode-7\n")
    yield


KILL = sends(signal.SIGKILL)
FAULTS = [
    Fault("data file missing on rank 1", on_rank(1, without_file("train.jsonl")), ("rank 1", "train.jsonl"), (2, 2)),
    Fault("a row of the data differs on rank 1", on_rank(1, other_row), ("rank 1", "train.jsonl"), (2, 2)),
    Fault("base missing on rank 1", on_rank(1, without_file("base")), ("rank 1", "base"), (2, 2)),
    Fault("other weights on rank 1", on_rank(1, other_weights), ("rank 1", "base"), (2, 2)),
    Fault(
        "another recipe on rank 1", on_rank(1, says("training.save_steps=3")), ("rank 1", "training.save_steps"), (2, 2)
    ),
    Fault("another seed on rank 1", on_rank(1, says("training.seed=3")), ("rank 1", "training.seed"), (2, 2)),
    Fault("another command on rank 1", on_rank(1, says("--resume")), ("rank 1", "--resume"), (2, 2)),
    Fault("another tunekit on rank 1", on_rank(1, other_version("tunekit")), ("rank 1", "tunekit", "0.0.1"), (2, 2)),
    Fault("another torch on rank 1", on_rank(1, other_version("torch")), ("rank 1", "torch", "0.0.1"), (2, 2)),
    Fault("clock of rank 1 an hour ahead", on_rank(1, later_clock), ("rank 1", "clock"), (0, 0)),
    Fault("two threads on rank 1, one on rank 0", on_rank(1, other_threads), ("rank 1", "threads"), (0, 0)),
    Fault("run folder not shared", own_folder, ("rank 1", "output.dir"), (0, 0)),
    Fault("full disk on rank 1, which writes only its cache", on_rank(1, full_disk), (), (0, 0)),
    Fault("full disk on rank 0 after step 3", on_rank(0, at_step(3, full_disk)), ("space",), (4, 4), True),
    Fault("port in use by another program", lambda node: None, ("port", "MASTER_PORT"), (4, 4), around=listening),
    Fault("rank 1 does not reach rank 0", on_rank(1, sets(MASTER_PORT="1")), ("rank 1", "MASTER_ADDR"), (4, 4)),
    Fault("WORLD_SIZE is 3, with two processes", sets(WORLD_SIZE="3"), ("rank 2", "WORLD_SIZE"), (4, 4)),
    Fault("WORLD_SIZE is 3 on rank 1 only", on_rank(1, sets(WORLD_SIZE="3")), ("rank 1", "WORLD_SIZE"), (2, 2)),
    Fault("RANK missing on rank 1", on_rank(1, sets(RANK="")), ("RANK",), (4, 2)),
    Fault("two processes with rank 0", on_rank(1, sets(RANK="0")), ("MASTER_PORT",), (4, 4)),
    Fault("rank 1 ends before it joins", on_rank(1, before_tunekit(7)), ("rank 1",), (4, 7)),
    Fault("two runs in a folder", lambda node: None, ("another process",), (2, 2), around=locked),
    Fault("two runs in a folder, on two machines", lambda node: None, ("node-7",), (2, 2), around=locked_elsewhere),
    Fault("lock of a killed run of another machine", says("--resume"), ("node-7",), (0, 0), around=stale_lock),
    Fault("rank 1 killed in a step", on_rank(1, at_step(3, KILL)), ("rank 1",), (4, -9), True),
    Fault("rank 0 killed in a step", on_rank(0, at_step(3, KILL)), ("rank 0",), (-9, 4), True),
    Fault("rank 1 killed in an evaluation", on_rank(1, at_evaluation(KILL)), ("rank 1",), (4, -9), True),
    Fault("rank 0 killed while it saves", on_rank(0, while_saving(KILL)), ("rank 0",), (-9, 4), True),
    Fault("rank 1 stopped in a step", on_rank(1, at_step(3, sends(signal.SIGSTOP))), ("rank 1",), (4, -9), True),
    Fault("rank 0 stopped in a step", on_rank(0, at_step(3, sends(signal.SIGSTOP))), ("rank 0",), (-9, 4), True),
    Fault("rank 1 hangs in a step", on_rank(1, at_step(3, hangs)), ("rank 1",), (4, 4), True),
    Fault("SIGTERM to rank 1 in a step", on_rank(1, at_step(3, sends(signal.SIGTERM))), ("SIGTERM",), (143, 143), True),
    Fault("out of memory on rank 1", on_rank(1, at_step(3, raises(MemoryError()))), ("rank 1", "memory"), (4, 4), True),
    Fault("a bug on rank 1", on_rank(1, at_step(3, raises(ValueError("odd")))), ("rank 1", "odd"), (1, 1), True),
    Fault("NaN on rank 1", on_rank(1, at_step(3, not_finite)), ("not finite", "train.jsonl"), (3, 3), True),
]


def run_fault(fault: Fault, case: Path, base: Path) -> dict[str, Any]:
    """Plant a fault, and resume the run if it can be resumed. Returns the facts for the table."""
    write_nodes(case, base)
    port = free_port()
    with fault.around(case, port):
        ends = run_nodes(case, fault.plant, port)
    facts: dict[str, Any] = {
        "codes": [end.code for end in ends],
        "seconds": round(max(end.seconds for end in ends), 1),
        "messages": [message(end.output, fault.says).replace(f"{case}/", "") for end in ends],
    }
    if fault.resumes:
        facts["checkpoint"] = max(checkpoints(case), default=None)
        facts["resumed"] = [end.code for end in run_nodes(case, resume=True)]
    return facts
