"""The device and the rank of this process, based on accelerate. Also the properties of each kind of device, and sums
over ranks."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tunekit.errors import Problem, RecipeError, TunekitError
from tunekit.machine.cards import planned_card
from tunekit.machine.meeting import check_own_gpus, gpu_of_nccl, is_launched, meet
from tunekit.machine.peers import Peers, leave_group

Value = TypeVar("Value")

# Settings of accelerate's launcher that tunekit does not support: harmless values, and what to write instead.
NOTHING = ("", "no", "none", "false", "0")
SAVING = (
    "to save memory, set memory.sharding, memory.streaming or model.quantization in the recipe, and remove this "
    "feature from accelerate's configuration"
)
REQUESTS = {
    "ACCELERATE_USE_FSDP": (NOTHING, SAVING),
    "ACCELERATE_USE_DEEPSPEED": (NOTHING, SAVING),
    "ACCELERATE_USE_MEGATRON_LM": (NOTHING, SAVING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (NOTHING, "remove this feature from accelerate's configuration"),
    "ACCELERATE_MIXED_PRECISION": (NOTHING, "set model.dtype in the recipe, and mixed_precision: 'no' in "
    "accelerate's "
    "configuration"),
    "ACCELERATE_DYNAMO_BACKEND": (NOTHING, "remove dynamo from accelerate's configuration"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        (*NOTHING, "1"),
        "set training.gradient_accumulation_steps in the recipe, and gradient_accumulation_steps: 1 in accelerate's "
        "configuration",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DeviceKind:
    """Properties of one kind of device. Plans for devices that are not on this machine use them too."""

    # memory separate from the host's, with copy streams from pinned memory and an allocator that records peaks
    own_memory: bool = True
    float64: bool = True
    gates: bool = True  # torch's fused AdamW can skip a non-finite update on the device itself
    bitsandbytes: bool = True  # has bitsandbytes' kernels
    numbered: bool = True  # a machine may have several of these devices


# ROCm devices are of the kind cuda, as in torch. A CPU computes synchronously, so it needs no late gate.
KINDS = {
    "cpu": DeviceKind(own_memory=False, numbered=False),
    "cuda": DeviceKind(),
    "xpu": DeviceKind(),
    "mps": DeviceKind(own_memory=False, float64=False, gates=False, bitsandbytes=False, numbered=False),
}
NAMES = "cpu, cuda, cuda:N, xpu, xpu:N or mps"
TPU = (
    "tunekit does not support TPUs: XLA compiles a whole step for its shapes, but the steps of a run have many "
    "shapes. Also, a run copies layers during the computation, and reads numbers on the host",
    f"choose {NAMES}",
)


def kind_of(device: torch.device) -> DeviceKind:
    """The properties of this device's kind; the meta device counts as a CPU."""
    return KINDS.get(device.type, KINDS["cpu"])


def is_here(device: torch.device) -> bool:
    """Whether this process can use a device of this kind. If not, a run can only be planned for it."""
    if device.type == "cpu":
        return True
    return planned_card() is None and bool(torch.get_device_module(device).is_available())


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU. If the GPU is not on this machine, the result is (99, 0), as if it had
    every kernel.

    (0, 0) for other devices: ROCm numbers its devices differently, and its versions of these kernels differ.
    """
    card = planned_card()
    if device.type == "cuda" and card is not None:
        return card.capability
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (99, 0)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device computes matrix products in bfloat16 natively. True for a device that is not on this machine,
    unless it is a card without bfloat16."""
    if not is_here(device):
        card = planned_card()
        return card is None or card.bfloat16
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    return bool(torch.get_device_module(device).is_bf16_supported(including_emulation=False))


def summing_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums over many rows."""
    return torch.float64 if kind_of(device).float64 else torch.float32


def for_sums(tensor: Tensor) -> Tensor:
    """Convert a tensor to the dtype for sums over many rows, on its device."""
    return tensor.to(summing_dtype(tensor.device))


def as_float64(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64 for matrix decompositions. If the device has no float64, the result is on the
    host."""
    return (tensor if kind_of(tensor.device).float64 else tensor.cpu()).double()


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """A context manager: inside the block, a GPU adds numbers in a fixed order, if `wanted`. By default, this order
    varies in the backward of attention.

    Raises: RecipeError if torch has no deterministic kernel for an operation.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if wanted:
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # filling uninitialised memory would only slow down the run
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
    """A context manager that restores the random states of the host and the device when the block ends."""
    places = [] if device.type in ("cpu", "meta") else [device.index or 0]
    return torch.random.fork_rng(places, device_type=device.type if places else "cpu")


class Devices:
    """The device and rank of one process of a run. If there is only one process, values are not exchanged, and methods
    such as `sum` return their input. As a context manager, it tells the other ranks at the end how this rank ends."""

    peers: ClassVar[Peers | None] = None  # the other ranks, which a process meets once

    def __init__(self, wanted: torch.device | None = None) -> None:
        from accelerate import PartialState
        from accelerate.utils import check_cuda_p2p_ib_support

        if torch.cuda.is_available() and not (is_launched() and check_cuda_p2p_ib_support()):
            for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
                os.environ.setdefault(name, "1")  # for RTX 40 with an old driver; one process does not use NCCL
        meeting = meet(kind_wanted(wanted)) if Devices.peers is None else None
        # without `cpu`, ranks on a machine without an accelerator would not form a group
        self.state = PartialState(
            cpu=wanted is not None and wanted.type == "cpu", **(meeting.keywords if meeting else {})
        )
        if meeting is not None:
            Devices.peers = Peers(meeting)
        self.world: int = self.state.num_processes
        device: torch.device = self.state.device if wanted is None or self.world > 1 else wanted
        check_device(device, wanted)
        torch.backends.cudnn.allow_tf32 = False  # torch's default rounds the convolutions of a float32 model to 10 bits
        # with an index, since torch's limits and streams need one; but accelerate also numbers the CPU of a rank
        self.device = torch.device("cpu") if device.type == "cpu" else torch.device(device.type, device.index or 0)
        if self.device.index:
            torch.accelerator.set_device_index(self.device.index)
        self.rank: int = self.state.process_index
        # called before every exchange: a rank that waits here still helps others to gather a sharded base
        self.before_exchange: Callable[[], None] = lambda: None
        several = self.world > 1 and self.device.type != "cpu"
        # numbers of the host are summed over gloo: the device's backend would wait for the device's computation
        self.host: Any = torch.distributed.new_group(backend="gloo") if several else None
        self.hosts: list[str] = self.gather([socket.gethostname()])  # of each rank
        if several:
            check_own_gpus(self.gather([gpu_of_nccl(self.device)]), list(map(self.name, range(self.world))))
        self.turns = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which locks the run folder, writes files and prints."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """A rank and its machine, for messages."""
        return f"rank {rank} (on {self.hosts[rank]})"

    def _exchanges(self) -> bool:
        """Whether values are exchanged now. Calls `before_exchange`, and counts the exchanges: a rank that stays behind
        can then be named."""
        if self.world > 1:
            self.before_exchange()
        if self.peers is not None:
            self.peers.exchanges += 1
        return self.world > 1

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over ranks, in its dtype and on its device."""
        if self._exchanges():
            torch.distributed.all_reduce(value, group=self.host if value.is_cpu else None)
        return value

    def sum_in_place(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over ranks, such as the flat gradients."""
        if self._exchanges():
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def any(self, flag: int) -> int:
        """The maximum of a small non-negative `flag` over ranks, so that all ranks notice a signal or an error of one
        rank."""
        if not self._exchanges():
            return flag
        value = torch.tensor([flag], dtype=torch.int64)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=self.host)
        return int(value.item())

    def from_main(self, value: Value) -> Value:
        """Return the main rank's value (JSON-like) on all ranks."""
        if not self._exchanges():
            return value
        holder = [value]
        torch.distributed.broadcast_object_list(holder, src=0, group=self.host)
        return holder[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the JSON-like values of all ranks on all ranks, in rank order."""
        if not self._exchanges():
            return values
        holder: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(holder, values, group=self.host)
        return [value for of_rank in holder for value in of_rank]

    def on_main(self, work: Callable[[], Value]) -> Value | None:
        """Call `work` on the main rank only, and return its result there; other ranks return None. An error on the main
        rank is raised on all ranks. Other ranks wait without a limit, while the main rank is alive."""
        value, error = None, None
        if self.is_main:
            try:
                value = work()
            except TunekitError as problem:
                error = problem
        self.turns += 1
        self.before_exchange()  # the work may gather a sharded base
        if self.peers is not None:
            self.peers.take_turn(self.turns)
        error = self.from_main(error)
        if error is not None:
            raise error
        return value

    def main_first(self, work: Callable[[], Value]) -> Value:
        """Call `work` on the main rank first, then on one rank of each other machine, then on the other ranks. So each
        machine fills its caches (encoded rows, downloaded models) only once."""
        value, leader = self.on_main(work), self.hosts.index(self.hosts[self.rank])
        if self.rank == leader != 0:
            value = work()
        if self.peers is not None and leader != 0:
            self.peers.take_turn(self.turns, leader)
        return work() if value is None else value

    def wait(self) -> None:
        """Wait until every rank has reached this call."""
        self.before_exchange()
        self.state.wait_for_everyone()

    def numbers(self, number: int) -> list[int]:
        """The numbers that all ranks pass to this call, in rank order. Does not call `before_exchange`."""
        numbers = torch.empty(self.world, dtype=torch.int64)
        _gather_into(numbers, torch.tensor([number]), group=self.host)
        return [int(each) for each in numbers]

    def gather_shares(self, target: Tensor, share: Tensor) -> "list[torch.distributed.Work]":
        """Start to write the shares (n,) of all ranks, in rank order, into `target` (world n,) on the device. Does not
        call `before_exchange`. Call `wait` on each item of the result before you read `target`.

        On a CPU, each rank sends its share to all others: the gathering of gloo would need a copy of `target`.
        """
        if not target.is_cpu:
            return [_gather_into(target, share, async_op=True)]
        parts = target.view(self.world, -1)
        parts[self.rank].copy_(share)
        return [torch.distributed.broadcast(part, src=rank, async_op=True) for rank, part in enumerate(parts)]

    def cause(self, error: BaseException) -> BaseException:
        """The error itself, or the error of another rank that has caused it."""
        return error if self.peers is None else self.peers.cause(error)

    def undisturbed(self) -> AbstractContextManager[None]:
        """A context manager for work that must be complete, such as writing: the loss of another rank does not end this
        process before the block ends."""
        return nullcontext() if self.peers is None else self.peers.undisturbed()

    def close(self, error: BaseException | None = None) -> None:
        """Leave the process group, and tell the other ranks about an error."""
        if self.peers is not None:
            self.peers.end(error)
        elif self.world > 1:
            leave_group(error)

    def __enter__(self) -> "Devices":
        return self

    def __exit__(self, kind: object, caught: BaseException | None, trace: TracebackType | None) -> None:
        error = None if caught is None else self.cause(caught)
        self.close(error)
        if error is not None and error is not caught:
            raise error from caught


def kind_wanted(wanted: torch.device | None) -> str:
    """The kind of the device of --device; without it, the kind of the accelerator."""
    device = wanted or torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def _gather_into(target: Tensor, share: Tensor, **settings: object) -> "torch.distributed.Work":
    """torch's gathering of equal shares; torch 2.13 has renamed it."""
    functions = vars(torch.distributed)
    gather: Callable[..., torch.distributed.Work]
    gather = functions.get("all_gather_single", functions["all_gather_into_tensor"])
    return gather(target, share, **settings)


def check_device(device: torch.device, wanted: torch.device | None) -> None:
    """Raises: RecipeError for an unknown kind of device, or if this rank's device is not the device of --device."""
    if device.type == "xla":
        raise RecipeError(*TPU)
    if device.type not in KINDS:
        raise RecipeError(f"tunekit does not know {device.type} devices", "choose --device cpu")
    if wanted is not None and (device.type != wanted.type or (wanted.index or device.index) != device.index):
        how = "remove --device, or choose the visible devices with CUDA_VISIBLE_DEVICES or ZE_AFFINITY_MASK"
        raise RecipeError(f"--device {wanted} is not the device of this rank, {device}", how)


def check_requests() -> None:
    """Raises: RecipeError if the environment requests a feature that tunekit lacks and would otherwise ignore."""
    requests = [(name, os.environ.get(name, ""), *request) for name, request in REQUESTS.items()]
    wrong = [
        (f"the environment variable {name}={value} requests a feature that tunekit does not support", how)
        for name, value, harmless, how in requests
        if value.strip().lower() not in harmless
    ]
    if wrong:
        raise RecipeError.of([Problem(*what_and_how) for what_and_how in wrong])


def make_devices() -> Devices:
    """The devices of this process: the device of --device if the option was passed, else the machine's accelerator,
    else the CPU.

    The option's value is in the environment variable TUNEKIT_DEVICE.
    Raises: RecipeError if the name is not a device, if torch does not find the device, or if check_requests finds a
    problem.
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
        raise RecipeError(f"--device (or TUNEKIT_DEVICE) is {name}, but torch sees no such device", "remove it")
    count = torch.get_device_module(wanted).device_count() if wanted.index else 1
    if (wanted.index or 0) >= count:
        raise RecipeError(
            f"--device is {name}, but torch finds only {count} of these devices, numbered from 0", f"choose {kind}:0"
        )
    return Devices(wanted)
