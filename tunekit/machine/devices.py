"""The device layer: which device and rank this is, and sums over ranks, through accelerate.

Comes in: the environment (torchrun, accelerate launch or neither).  Goes out: Devices.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from tunekit.errors import RecipeError, TunekitError

Value = TypeVar("Value")
ENDING_SECONDS = 5.0  # a connection closes before the process that had it has ended


class Devices:
    """One process of a run. With a single process every method is the identity."""

    def __init__(self, cpu: bool) -> None:
        from accelerate.state import PartialState

        self.state = PartialState(cpu=cpu)  # without `cpu`, ranks on a machine that has no accelerator stay strangers
        device: torch.device = self.state.device  # without an index, which torch's limits and streams ask for
        index = 0 if device.index is None else device.index
        self.device = device if device.type == "cpu" else torch.device(device.type, index)
        self.rank: int = self.state.process_index
        self.world: int = self.state.num_processes
        self.processes: list[tuple[int, str, int]] = self.gather([(self.rank, socket.gethostname(), os.getpid())])

    @property
    def is_main(self) -> bool:
        """Whether this rank locks, writes and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over ranks, in its own dtype; float64 on the CPU."""
        if self.world == 1:
            return value
        placed = value.to(self.device)
        torch.distributed.all_reduce(placed)
        return placed.to(value.device)

    def sum_in_place(self, tensors: list[Tensor]) -> None:
        """Sum each flat gradient over ranks."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def any(self, flag: int) -> int:
        """The largest of a small non-negative number over ranks: a signal or an error on one rank concerns all."""
        if self.world == 1:
            return flag
        value = torch.tensor([flag], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return int(value.item())

    def from_main(self, value: object) -> Any:
        """The main rank's plain value (JSON-like), on every rank."""
        if self.world == 1:
            return value
        holder = [value]
        torch.distributed.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """The plain values of every rank, in rank order, on every rank."""
        if self.world == 1:
            return values
        holder: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(holder, values)
        return [value for of_rank in holder for value in of_rank]

    def on_main(self, work: Callable[[], Value]) -> Value | None:
        """Do `work` on the main rank alone; an error of it is raised on every rank. None on the others."""
        value, error = None, None
        if self.is_main:
            try:
                value = work()
            except TunekitError as problem:
                error = problem
        error = self.from_main(error)
        if error is not None:
            raise error
        return value

    def main_first(self, work: Callable[[], Value]) -> Value:
        """Do `work` on the main rank, then on the others: what it leaves in a cache is made once."""
        value = self.on_main(work)
        return work() if value is None else value

    def lost_ranks(self) -> list[int]:
        """Ranks on this machine whose process has ended; waits a moment for one to end that is about to."""
        here, deadline = socket.gethostname(), time.monotonic() + ENDING_SECONDS
        while True:
            lost = [rank for rank, host, process in self.processes if host == here and has_ended(process)]
            if lost or self.world == 1 or time.monotonic() > deadline:
                return lost
            time.sleep(0.05)

    def wait(self) -> None:
        """Until every rank is here."""
        self.state.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def has_ended(process: int) -> bool:
    """Whether no process of this id runs, if only its parent has not yet asked how it ended."""
    try:
        return bool(psutil.Process(process).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def make_devices() -> Devices:
    """The devices of this process.

    TUNEKIT_DEVICE=cpu keeps a run off the GPU.
    Raises: RecipeError where TUNEKIT_DEVICE names anything else.
    """
    wanted = os.environ.get("TUNEKIT_DEVICE", "")
    if wanted not in ("", "cpu", "cuda"):
        raise RecipeError(f"TUNEKIT_DEVICE is {wanted!r}", "set it to cpu or cuda, or leave it unset")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("TUNEKIT_DEVICE is cuda, but torch sees no CUDA device")
    return Devices(cpu=wanted == "cpu" or not torch.cuda.is_available())
