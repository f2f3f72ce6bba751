"""Runs of two processes, each of which can be changed before tunekit starts in it.

Each process is one node: it has its own folder with a copy of recipe, data and base, its own cache, and a log. The
processes are forked, so that they import torch only once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.train_case import free_port, write_recipe

STEPS = 8
PATIENCE_SECONDS = 240.0  # on an idle machine
SHORT_SECONDS = 8.0  # instead of the minutes that a run waits for a silent or absent rank, on an idle machine
NODES = (0, 1)
LIBRARIES = ("[", "frame", "<omitting", "Exception raised")  # how lines of torch's log begin
Plant = Callable[["Node"], None]


@dataclass
class Node:
    """One process of a planted run. `words`: the command line; `case`: the folder of all nodes."""

    rank: int
    case: Path
    words: list[str]
    variables: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.case / f"node-{self.rank}"

    def strike(self) -> None:
        """Note the moment of the fault."""
        (self.case / "struck").write_text(str(time.time()))


@dataclass(frozen=True)
class NodeEnd:
    """How the process of a node ended: `code` as a shell sees it, None if it had to be killed. `seconds`: since the
    fault."""

    code: int | None
    seconds: float
    output: str


def write_nodes(case: Path, base: Path) -> None:
    """Two node folders with equal content; the run's folder is shared."""
    training = {"max_steps": STEPS, "epochs": None, "save_steps": 2, "eval_steps": 4, "gradient_accumulation_steps": 2}
    for rank in NODES:
        folder = case / f"node-{rank}"
        sections = {"adapter": {"dropout": 0.0}, "evaluation": {"batch_size": 1}}  # each rank has evaluation rows
        write_recipe(folder, Path("base"), training=training, **sections)
        shutil.copytree(base, folder / "base")
        values = json.loads((folder / "recipe.yaml").read_text())
        del values["training"]["epochs"]
        values["model"]["name_or_path"] = "./base"
        (folder / "recipe.yaml").write_text(json.dumps(values))


def slowness() -> float:
    """How many times slower a process may be than on an idle machine: the programs that want each processor."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _main(node: Node, plant: Plant) -> int:
    """The command in a forked child. Returns its exit code."""
    from accelerate.state import PartialState

    from tunekit.cli import main
    from tunekit.files import lock
    from tunekit.machine import meeting, peers

    PartialState._reset_state()  # type: ignore[no-untyped-call]  # an earlier test may have had one process
    os.chdir(node.folder)
    short = SHORT_SECONDS * slowness()
    meeting.EXCHANGE_SECONDS = 4 * short  # an exchange can take longer than the silence of a rank
    meeting.JOINING_SECONDS = peers.SILENCE_SECONDS = lock.WATCHING_SECONDS = short
    plant(node)
    os.environ.update(node.variables)
    for name in [name for name, value in node.variables.items() if not value]:
        del os.environ[name]
    sys.argv = ["tunekit", *node.words]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _start(node: Node, plant: Plant) -> int:
    """Fork the process of a node, and return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    log = os.open(node.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    code = 99
    try:
        code = _main(node, plant)
    except BaseException:  # of the plant
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run_nodes(
    case: Path, plant: Plant = lambda node: None, port: int | None = None, resume: bool = False
) -> list[NodeEnd]:
    """Run both nodes to their end; after some minutes they are killed."""
    port = port or free_port()
    (case / "struck").unlink(missing_ok=True)
    started, processes, patience = time.time(), {}, PATIENCE_SECONDS * slowness()
    for rank in NODES:
        words = ["train", "recipe.yaml", f"output.dir={case / 'run'}", *(["--resume"] if resume else [])]
        variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(port), "TUNEKIT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        variables |= {"TUNEKIT_CACHE": str(case / f"node-{rank}" / "cache")}
        node = Node(rank, case, words, variables)
        (node.folder / "log").unlink(missing_ok=True)
        processes[_start(node, plant)] = rank
    ends: dict[int, tuple[int | None, float]] = {}
    while len(ends) < len(processes):
        for child in [child for child, rank in processes.items() if rank not in ends]:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                ends[processes[child]] = os.waitstatus_to_exitcode(status), time.time()
            elif time.time() - started > patience:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                ends[processes[child]] = None, time.time()
        stopped = [child for child, rank in processes.items() if rank not in ends and is_stopped(child)]
        if stopped and len(ends) + len(stopped) == len(processes):  # only a stopped process is left
            os.kill(stopped[0], signal.SIGKILL)
        time.sleep(0.02)
    struck = case / "struck"
    moment = float(struck.read_text()) if struck.exists() else started
    texts = {rank: (case / f"node-{rank}" / "log").read_text(errors="replace") for rank in NODES}
    return [NodeEnd(ends[rank][0], ends[rank][1] - moment, texts[rank]) for rank in NODES]


def is_stopped(process: int) -> bool:
    """Whether a process is stopped by a signal."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def checkpoints(case: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    return sorted(int(path.name[5:]) for path in (case / "run" / "checkpoints").glob("step-*"))


def message(output: str, texts: Sequence[str]) -> str:
    """The last line of a log that tunekit wrote and that contains one of the texts; an empty text if there is none."""
    lines = [line for line in output.splitlines() if not line.startswith(LIBRARIES)]
    return next((line for line in reversed(lines) if any(text in line for text in texts)), "")
