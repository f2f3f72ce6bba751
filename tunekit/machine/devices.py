"""The device layer: which device and rank this is, what its kind has, and sums over ranks, through accelerate.

Comes in: the environment (torchrun, accelerate launch or neither).  Goes out: Devices, and the facts of a kind.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from tunekit.errors import Problem, RecipeError, TunekitError

Value = TypeVar("Value")
Item = TypeVar("Item")
ENDING_SECONDS = 5.0  # a connection closes before the process that had it has ended
FAILED = "tunekit: the main rank has failed"  # a key that ranks share

# What accelerate's launcher hands on that tunekit does not do: values that ask for nothing, and what to write instead.
NOTHING = ("", "no", "none", "false", "0")
SAVING = "write memory.streaming or model.quantization to save memory, and take it out of accelerate's configuration"
REQUESTS = {
    "ACCELERATE_USE_FSDP": (NOTHING, SAVING),
    "ACCELERATE_USE_DEEPSPEED": (NOTHING, SAVING),
    "ACCELERATE_USE_MEGATRON_LM": (NOTHING, SAVING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (NOTHING, "take it out of accelerate's configuration"),
    "ACCELERATE_MIXED_PRECISION": (NOTHING, "write model.dtype in the recipe, and mixed_precision: 'no' there"),
    "ACCELERATE_DYNAMO_BACKEND": (NOTHING, "write training.compile in the recipe, and take it out there"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        (*NOTHING, "1"), "write training.gradient_accumulation_steps in the recipe, and 1 there",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DeviceKind:
    """What every device of a kind has, asked for whether there is one here or a run is only planned for it."""

    own_memory: bool = True  # apart from the host's; streams of copies from pinned memory; its allocator keeps peaks
    float64: bool = True
    gates: bool = True  # torch's fused AdamW keeps a non-finite update off on the device itself
    bitsandbytes: bool = True  # its kernels
    numbered: bool = True  # there may be several


# ROCm's devices are of the kind cuda, as torch has them. A CPU computes when it is told, and gates nothing late.
KINDS = {
    "cpu": DeviceKind(own_memory=False, numbered=False),
    "cuda": DeviceKind(),
    "xpu": DeviceKind(),
    "mps": DeviceKind(own_memory=False, float64=False, gates=False, bitsandbytes=False, numbered=False),
}
NAMES = "cpu, cuda, cuda:N, xpu, xpu:N or mps"
TPU = (
    "a TPU is no device of tunekit: XLA compiles a whole step for its shapes, and a run has steps of many shapes, "
    "layers that are copied beside the computation, and numbers that the host reads",
    f"choose {NAMES}",
)


def kind_of(device: torch.device) -> DeviceKind:
    """What devices of this kind have; tensors without values (meta) count as a CPU's."""
    return KINDS.get(device.type, KINDS["cpu"])


def is_here(device: torch.device) -> bool:
    """Whether this process has a device of this kind, or only plans for it."""
    return device.type == "cpu" or bool(torch.get_device_module(device).is_available())


def capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU, its compute capability; one that is planned for and is not here has every kernel. Of any other
    device (0, 0): ROCm counts otherwise, and has the kernels of CUDA that this is asked for in other forms."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (99, 0)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator has products in bfloat16; one that is planned for and is not here is taken to."""
    if not is_here(device):
        return True
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    return bool(torch.get_device_module(device).is_bf16_supported(including_emulation=False))


def summing_dtype(device: torch.device) -> torch.dtype:
    """In which sums over many rows are taken."""
    return torch.float64 if kind_of(device).float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """As sums over many rows are taken, where it is."""
    return tensor.to(summing_dtype(tensor.device))


def doubled(tensor: Tensor) -> Tensor:
    """In float64, to be decomposed: on the host where the device has none."""
    return (tensor if kind_of(tensor.device).float64 else tensor.cpu()).double()


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """A block in which, where `wanted`, a GPU adds up in a fixed order: attention's backward pass does not of itself.

    Raises: RecipeError where torch has no such kernel for something that is computed.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if wanted:
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # a pass over memory, for what nobody reads
    try:
        yield
    except RuntimeError as error:
        if not wanted or "deterministic" not in str(error):
            raise
        what = f"there is no deterministic kernel for this run ({str(error).strip().partition('.')[0]})"
        raise RecipeError(what, "write deterministic: false", key="training.deterministic") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def forked_random(device: torch.device) -> AbstractContextManager[None]:
    """A block after which the random states of the host and of the device are as before."""
    places = [] if device.type in ("cpu", "meta") else [device.index or 0]
    return torch.random.fork_rng(places, device_type=device.type if places else "cpu")


class Devices:
    """One process of a run. With a single process every method is the identity."""

    def __init__(self, wanted: torch.device | None = None) -> None:
        from accelerate.state import PartialState

        # without `cpu`, ranks on a machine that has no accelerator stay strangers
        self.state = PartialState(cpu=wanted is not None and wanted.type == "cpu")
        self.world: int = self.state.num_processes
        found: torch.device = self.state.device if wanted is None or self.world > 1 else wanted
        check_found(found, wanted)
        # with an index, which torch's limits and streams ask for
        self.device = found if found.type == "cpu" else torch.device(found.type, found.index or 0)
        if self.device.index:
            torch.accelerator.set_device_index(self.device.index)
        self.rank: int = self.state.process_index
        several = self.world > 1 and self.device.type != "cpu"
        # numbers of the host are summed there: over the device's own backend they would wait for its computation
        self.host: Any = torch.distributed.new_group(backend="gloo") if several else None
        self.processes: list[tuple[int, str, int]] = self.gather([(self.rank, socket.gethostname(), os.getpid())])

    @property
    def is_main(self) -> bool:
        """Whether this rank locks, writes and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over ranks, in its own dtype, where it is."""
        if self.world > 1:
            torch.distributed.all_reduce(value, group=self.host if value.is_cpu else None)
        return value

    def sum_in_place(self, tensors: list[Tensor]) -> None:
        """Sum each flat gradient over ranks."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def any(self, flag: int) -> int:
        """The largest of a small non-negative number over ranks: a signal or an error on one rank concerns all."""
        if self.world == 1:
            return flag
        value = torch.tensor([flag], dtype=torch.int64)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=self.host)
        return int(value.item())

    def rounds(self, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        """This rank's item of each round of `world` items, and whether it counts.

        If the last round has too few items, the other ranks take its first one again, which does not count: ranks that
        share a base must make equally many forwards.
        """
        batches = iter(items)
        while some := list(islice(batches, self.world)):
            counts = self.rank < len(some)
            yield some[self.rank if counts else 0], counts

    def missing(self, items: int, own: int) -> int:
        """How many forwards this rank makes fewer than the first one, if ranks take turns at so many items."""
        return -(-items // self.world) - own

    def from_main(self, value: Value) -> Value:
        """The main rank's plain value (JSON-like), on every rank."""
        if self.world == 1:
            return value
        holder = [value]
        torch.distributed.broadcast_object_list(holder, src=0, group=self.host)
        return holder[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """The plain values of every rank, in rank order, on every rank."""
        if self.world == 1:
            return values
        holder: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(holder, values, group=self.host)
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

    def fails_alone(self) -> bool:
        """Whether this rank failed and the main rank, which prints for all, did not; waits a moment for it to fail."""
        if self.world == 1:
            return False
        store = torch.distributed.distributed_c10d._get_default_store()
        try:
            if self.is_main:
                store.set(FAILED, "")
            else:
                store.wait([FAILED], timedelta(seconds=ENDING_SECONDS))
        except RuntimeError:  # it took too long, or the store ended with the rank that had it
            return not self.is_main
        return False

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


def check_found(found: torch.device, wanted: torch.device | None) -> None:
    """Raises: RecipeError for a device that tunekit does not know, and for ranks that got another than was wanted."""
    if found.type == "xla":
        raise RecipeError(*TPU)
    if found.type not in KINDS:
        raise RecipeError(f"tunekit does not know {found.type} devices", "choose --device cpu")
    if wanted is not None and (found.type != wanted.type or (wanted.index or found.index) != found.index):
        how = "leave --device out, or choose which ranks see with CUDA_VISIBLE_DEVICES or ZE_AFFINITY_MASK"
        raise RecipeError(f"--device {wanted} is not the device of this rank, {found}", how)


def check_requests() -> None:
    """Raises: RecipeError where the environment asks for what tunekit does not do, and would be ignored."""
    asked = [(name, os.environ.get(name, ""), *request) for name, request in REQUESTS.items()]
    wrong = [
        (f"the environment has {name}={value}, which tunekit does not follow", how)
        for name, value, nothing, how in asked
        if value.strip().lower() not in nothing
    ]
    if wrong:
        raise RecipeError.of([Problem(*each) for each in wrong])


def make_devices() -> Devices:
    """The devices of this process: what --device names, else the accelerator of this machine, else the CPU.

    The option comes in TUNEKIT_DEVICE.
    Raises: RecipeError where it names no device, or one that torch does not see, or check_requests finds something.
    """
    check_requests()
    name = os.environ.get("TUNEKIT_DEVICE", "")
    if not name:
        return Devices(None if torch.accelerator.is_available() else torch.device("cpu"))
    kind, colon, number = name.partition(":")
    if kind in ("tpu", "xla"):
        raise RecipeError(*TPU)
    if kind not in KINDS or (colon and not (KINDS[kind].numbered and number.isdecimal())):
        raise RecipeError(f"--device (or TUNEKIT_DEVICE) is {name!r}", f"choose {NAMES}")
    wanted = torch.device(name)
    if not is_here(wanted):
        raise RecipeError(f"--device (or TUNEKIT_DEVICE) is {name}, but torch sees no such device", "leave it out")
    count = torch.get_device_module(wanted).device_count() if wanted.index else 1
    if (wanted.index or 0) >= count:
        raise RecipeError(f"--device is {name}, but torch sees {count} of them, counted from 0", f"choose {kind}:0")
    return Devices(wanted)
