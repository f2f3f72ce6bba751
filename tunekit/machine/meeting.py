"""How the ranks of a run meet, before torch's process group forms. Each rank writes its state into torch's store, a
key-value server on the main rank's machine. So a rank that is missing, has failed or differs is named."""

import json
import os
import socket
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import psutil
import torch
from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

from tunekit.errors import InputError, OtherRankError, Problem, ResourceError, TunekitError, exit_message, redact
from tunekit.machine.environment import library_versions

JOINING_SECONDS = 300.0  # from the start of a rank until all ranks have joined
ANSWER_SECONDS = 5.0  # torch's store answers at once, unless its machine is busy
EXCHANGE_SECONDS = 1800.0  # a rank that is alive must come to each exchange of values within this time
ENDING_SECONDS = 5.0  # a rank that ends waits so long for the other ranks to notice
EARLY_SECONDS = 15.0  # as ENDING_SECONDS, before the ranks have joined: they may still be importing their libraries
POLLING_SECONDS = 0.1
KNOCKING_SECONDS = 0.5  # between two looks at the main rank's port: many ranks may wait for it
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate reads these launchers' variables
COMPARED = ("tunekit", "torch", "transformers")
START = "start the processes with torchrun, or with the file that `tunekit launch` writes"


@dataclass(frozen=True)
class Member:
    """Facts about a rank's process."""

    rank: int
    world: int
    host: str
    process: int
    device: str
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"rank {self.rank} (on {self.host})"


@dataclass(frozen=True)
class State:
    """What a rank has written into the store. `beat`: a number that grows while the process is alive. `end`: exit code
    and message, once the rank has ended. `relayed`: the message is already about another rank. `exchanges`: how many
    times it has exchanged values."""

    member: Member
    beat: int = 0
    exchanges: int = 0
    end: tuple[int, str] | None = None
    relayed: bool = False

    def text(self) -> str:
        """The state as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: bytes) -> "State":
        """The state in JSON."""
        values = json.loads(text)
        end = values.pop("end")
        return cls(**{**values, "member": Member(**values["member"]), "end": end and (end[0], end[1])})


@dataclass(frozen=True)
class Meeting:
    """The store, and the ranks that have joined it, in their order. `keywords`: for torch's init_process_group."""

    store: Store
    members: Sequence[Member]
    ours: Member
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def clone_of_store(self) -> Store:
        """The same store for another thread: a thread that waits blocks its own clone only."""
        return cast(Store, cast(Any, self.store).clone())


def key_of(rank: int) -> str:
    """The store's key of a rank's state. Each restart by torchrun has its own keys."""
    return f"tunekit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def place_in_group() -> tuple[int, int] | None:
    """The rank and the number of ranks; None for a process without other ranks, or under MPI.

    Raises: InputError if a variable of the launcher is missing or wrong.
    """
    values = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    is_alone = values["WORLD_SIZE"] == "1" or not (values["WORLD_SIZE"] or values["LOCAL_RANK"])
    if is_alone or any(name in os.environ for name in OF_MPI):
        return None
    if missing := [name for name, value in values.items() if not value]:
        raise InputError(f"this process is one of several, but {' and '.join(missing)} is not set", START)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not values[name].isdecimal():
            raise InputError(f"the environment variable {name} is {values[name]!r}, not a number", START)
    rank, world = int(values["RANK"]), int(values["WORLD_SIZE"])
    if not 0 < int(values["MASTER_PORT"]) < 2**16:
        raise InputError(f"MASTER_PORT is {values['MASTER_PORT']}, which is not a port", "choose one from 1 to 65535")
    if world < 1:
        raise InputError(f"WORLD_SIZE is {world}", START)
    if rank >= world:
        raise InputError(f"RANK is {rank}, but WORLD_SIZE is {world}, so ranks are 0 to {world - 1}", START)
    return rank, world


def is_launched() -> bool:
    """Whether a launcher of several processes has started this process. Only such a process needs NCCL, whose check by
    accelerate runs nvidia-smi for up to some seconds."""
    return any(name in os.environ for name in ("LOCAL_RANK", *OF_MPI))


def meet(device: str) -> Meeting | None:
    """Wait until all ranks have joined, and compare them. None for a process without other ranks.

    Raises: ResourceError if ranks do not meet within JOINING_SECONDS; InputError if they differ; OtherRankError if one
    has failed.
    """
    place = place_in_group()
    if place is None:
        return None
    rank, world = place
    versions = {name: version for name, version in library_versions().items() if name in COMPARED}
    ours = Member(rank, world, socket.gethostname(), os.getpid(), device, versions)
    formed = torch.distributed.is_initialized()  # by Ray
    try:
        default_store = torch.distributed.distributed_c10d._get_default_store
        store = default_store() if formed else _open_store(place, JOINING_SECONDS)
    except ResourceError as error:
        error.alone = True  # without a store, no other rank can be told
        raise
    if store.add(f"{key_of(rank)}/processes", 1) > 1:
        what = f"another process has joined {store_address()} as rank {rank}"
        raise _told(InputError(what, "give each process its own RANK, and each run its own MASTER_PORT"))
    store.set(key_of(rank), State(ours).text())
    try:
        members = _wait_for_all(store, ours)
    except TunekitError as error:
        joined = [other for other in _awaited(place) if store.check([key_of(other)])]
        raise _told(error, tell_end(store, rank, joined, error, EARLY_SECONDS)) from None
    except DistError as error:
        how = "see the output of rank 0"
        raise ResourceError(f"rank 0 of {world} at {store_address()} has ended before all had joined", how) from error
    timeout = timedelta(seconds=EXCHANGE_SECONDS)
    keywords = {} if formed else {"store": store, "rank": rank, "world_size": world, "timeout": timeout}
    return Meeting(store, members, ours, keywords)


def _told(error: TunekitError, alone: bool = True) -> TunekitError:
    error.alone = alone
    return error


def store_address() -> str:
    """The address of torch's store."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _open_store(place: tuple[int, int], seconds: float) -> Store:
    """torch's store: the main rank starts it, unless torchrun has started it already. The other ranks wait until a
    program listens on its port, because torch would also wait for another program there.

    Raises: ResourceError if another program has the port, or if the store cannot be reached.
    """
    rank, world = place
    starts = rank == 0 and not torchrun_has_store()
    deadline, failed = time.monotonic() + seconds, False
    while not failed and time.monotonic() < deadline:
        if starts or _is_listening():
            store = _connect(starts, seconds if starts else ANSWER_SECONDS)
            if isinstance(store, Store):
                store.set_timeout(timedelta(seconds=seconds))
                return store
            if "EADDRINUSE" in str(store):
                what = f"port {os.environ['MASTER_PORT']} (MASTER_PORT) of rank 0's machine is in use"
                raise ResourceError(
                    what, "set MASTER_PORT to a free port on all ranks, or stop the other run"
                ) from store
            if not starts and _is_listening():
                place_text = f"{store_address()} (MASTER_ADDR:MASTER_PORT)"
                what = f"the program at {place_text} does not answer as rank 0 of {world}"
                raise ResourceError(
                    what, "set MASTER_PORT to a free port on all ranks; see the output of rank 0"
                ) from store
            failed = starts
        time.sleep(KNOCKING_SECONDS)
    what = f"rank {rank} of {world} did not reach rank 0 at {store_address()} (MASTER_ADDR:MASTER_PORT)"
    how = "see the output of rank 0; check these variables, and the firewall"
    raise ResourceError(f"{what} within {seconds:.0f} seconds", how)


def torchrun_has_store() -> bool:
    """Whether torchrun has started the store, in its own process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_listening() -> bool:
    """Whether a program accepts connections at MASTER_ADDR and MASTER_PORT."""
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), ANSWER_SECONDS).close()
    except (OSError, UnicodeError):  # the latter: a text that cannot be a host name
        return False
    return True


def _connect(starts: bool, seconds: float) -> Store | Exception:
    """torch's store, or the error of an attempt that lasts `seconds`. `starts`: whether this process starts the store.

    If another program has the port and says nothing, torch waits for ever. The result is then a TimeoutError.
    """
    opened: list[Store | Exception] = []

    def connect() -> None:
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=starts,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (DistError, ValueError) as error:
            opened.append(error)
        else:
            opened.append(store)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds + ANSWER_SECONDS)
    return opened[0] if opened else TimeoutError()


def _wait_for_all(store: Store, ours: Member) -> Sequence[Member]:
    """The members, once all ranks have joined. Raises: as `meet`."""
    deadline = time.monotonic() + JOINING_SECONDS
    while True:
        present = [rank for rank in range(ours.world) if store.check([key_of(rank)])]
        states = {rank: State.read(store.get(key_of(rank))) for rank in present}
        members = [state.member for state in states.values()]
        for state in states.values():
            if state.end is not None:
                raise failed_rank(str(state.member), ours.world, state)
        check_equal(members)
        absent = [rank for rank in range(ours.world) if rank not in present]
        if not absent:
            return members
        if time.monotonic() > deadline:
            what = f"rank {', '.join(map(str, absent))} of {ours.world} (WORLD_SIZE) has not joined"
            how = f"see the output of that rank, and check that {ours.world} processes are started"
            raise ResourceError(f"{what} {store_address()} within {JOINING_SECONDS:.0f} seconds", how)
        time.sleep(POLLING_SECONDS)


def check_equal(members: Sequence[Member]) -> None:
    """Raises: InputError if a rank has another WORLD_SIZE, kind of device, or version than the first."""
    problems = []
    for member in members[1:]:
        first = members[0]
        facts = [("WORLD_SIZE", member.world, first.world), ("the device", member.device, first.device)]
        facts += [(name, member.versions.get(name), first.versions.get(name)) for name in COMPARED]
        for name, there, here in facts:
            if there != here:
                what = f"{name} is {there} on {member}, but {here} on {first}"
                how = START if name == "WORLD_SIZE" else "all ranks need the same software and the same kind of device"
                problems.append(Problem(what, how))
    if problems:
        raise InputError.of(problems)


def gpu_of_nccl(device: torch.device) -> str:
    """The identity of this rank's GPU; empty if the ranks do not communicate by NCCL."""
    if device.type != "cuda" or "nccl" not in torch.distributed.get_backend():
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def check_own_gpus(gpus: Sequence[str], names: Sequence[str]) -> None:
    """`gpus`: the identity of each rank's GPU. `names`: of the ranks, for the message.

    Raises: InputError if two ranks have the same GPU, which NCCL cannot use.
    """
    for rank, gpu in enumerate(gpus):
        if gpu and gpus.index(gpu) < rank:
            what = (
                f"{names[gpus.index(gpu)]} and {names[rank]} have the same GPU, because there are fewer GPUs than ranks"
            )
            raise InputError(what, "start one process for each GPU, such as: torchrun --nproc-per-node gpu")


def failed_rank(name: str, world: int, state: State) -> OtherRankError:
    """The error of this rank after another rank has ended with an error."""
    code, text = state.end or (0, "")
    error = OtherRankError(text if state.relayed else f"{name} of {world} has failed: {text}")
    error.exit_code = code or OtherRankError.exit_code
    return error


def tell_end(store: Store, rank: int, awaited: Collection[int], error: BaseException, seconds: float) -> bool:
    """Write this rank's end into the store, and wait at most `seconds` until the ranks `awaited` have ended, too.
    Returns whether this rank must print its error: not if the main rank prints it."""
    text, code = exit_message(error)
    text, deadline = redact(text), time.monotonic() + seconds
    try:
        early = State(Member(rank, 0, socket.gethostname(), os.getpid(), "", {}))
        before = State.read(store.get(key_of(rank))) if store.check([key_of(rank)]) else early
        now = replace(before, end=(code, text), relayed=isinstance(error, OtherRankError))
        store.set(key_of(rank), now.text())
        while True:
            keys = [key_of(other) for other in awaited if store.check([key_of(other)])]
            states = {key: State.read(store.get(key)) for key in keys}
            known = all(state.end for state in states.values()) and len(states) == len(awaited)
            if known or time.monotonic() > deadline:
                time.sleep(5 * POLLING_SECONDS if rank == 0 else 0)  # the others may not have read its end yet
                return rank == 0 or not _main_prints(states.get(key_of(0)), now)
            time.sleep(POLLING_SECONDS)
    except DistError:  # the rank that holds the store has ended
        return True


def _main_prints(main: State | None, ours: State) -> bool:
    """Whether the main rank prints the error of this rank: the same text; or, on the same machine, one of the two texts
    names the other. There, wait until it is printed: a launcher ends all ranks as soon as one has failed."""
    if main is None or main.end is None or ours.end is None or not main.end[0]:
        return False
    (_, printed), (_, text) = main.end, ours.end
    near = main.member.host == ours.member.host
    if printed != text and not (near and (text in printed or printed in text)):
        return False
    deadline = time.monotonic() + ENDING_SECONDS
    while near and not has_ended(main.member.process) and time.monotonic() < deadline:
        time.sleep(POLLING_SECONDS)
    return True


def has_ended(process: int) -> bool:
    """Whether no process with this id is running; a zombie counts as ended."""
    try:
        return bool(psutil.Process(process).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def tell_early(error: BaseException) -> bool:
    """Tell the other ranks that this rank has failed before it joined them. Returns whether this rank must print its
    error: not if the main rank prints it."""
    try:
        place = place_in_group()
        if place is None or torch.distributed.is_initialized():
            return True
        return tell_end(_open_store(place, EARLY_SECONDS), place[0], _awaited(place), error, EARLY_SECONDS)
    except TunekitError:
        return True


def _awaited(place: tuple[int, int]) -> range:
    """The ranks that must know the end of a rank before it ends: the main rank holds the store, so it waits for all."""
    rank, world = place
    return range(1, world) if rank == 0 else range(1)
