"""How the ranks of a run watch each other. Each rank writes a growing number into torch's store; a rank that fails
writes its error. So the other ranks can name the rank and its error, and none of them waits for ever."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch.distributed import DistError

from tunekit.errors import OtherRankError, TunekitError
from tunekit.machine.meeting import (
    ENDING_SECONDS,
    POLLING_SECONDS,
    Meeting,
    Member,
    State,
    failed_rank,
    has_ended,
    key_of,
    store_address,
    tell_end,
    torchrun_has_store,
)

BEAT_SECONDS = 1.0
SHORTEST_SECONDS = 0.001  # between two looks at the store; each pause is twice as long, up to POLLING_SECONDS
SILENCE_SECONDS = 120.0  # a rank that has written nothing for so long is lost
SUSPENDED_SECONDS = 10.0  # if a thread slept longer than this, the whole process was suspended
QUIET_SECONDS = 4 * BEAT_SECONDS  # a rank that writes nothing for so long, when a connection has broken, has ended


def print_error(rank: int, error: TunekitError) -> None:
    """Print an error from the thread that watches."""
    text = str(error) if rank == 0 else f"rank {rank}: {error}"
    print("".join(each if each.isprintable() else " " for each in text), file=sys.stderr, flush=True)


class Peers:
    """The other ranks of a run. Two threads work until `end`: one reads and writes the store, one ends this process if
    another rank is lost while the main thread waits for it inside torch.

    `at_loss`: called before the process is ended so. `exchanges`: how many times this rank has exchanged values."""

    def __init__(self, meeting: Meeting) -> None:
        self.members, self.ours = meeting.members, meeting.ours
        self.others = [member for member in meeting.members if member.rank != meeting.ours.rank]
        self.at_loss: Callable[[TunekitError], None] = lambda error: None
        self._served = meeting.store  # the main rank's store answers as long as this object lives
        self._own_store, self._store = meeting.clone_of_store(), meeting.clone_of_store()
        self._ended, self._writing = threading.Event(), threading.Lock()
        self._states = {member.rank: State(member) for member in self.others}
        self._changed = dict.fromkeys(self._states, time.monotonic())  # when the state of a rank last changed
        self._answered = time.monotonic()  # when the store last answered
        self._works = self.exchanges = 0
        for work in (self._exchange, self._watch):
            threading.Thread(target=work, daemon=True).start()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A context manager: inside the block, the loss of another rank does not end this process."""
        self._works += 1
        try:
            yield
        finally:
            self._works -= 1

    def _exchange(self) -> None:
        """Write this rank's state and read those of the others, until the end or until the store is lost."""
        beat, keys = 0, [key_of(member.rank) for member in self.others]
        with contextlib.suppress(DistError):
            while not self._ended.wait(BEAT_SECONDS):
                beat += 1
                with self._writing:
                    if not self._ended.is_set():
                        self._store.set(key_of(self.ours.rank), State(self.ours, beat, self.exchanges).text())
                states = map(State.read, self._store.multi_get(keys))
                self._answered = time.monotonic()
                for member, state in zip(self.others, states, strict=True):
                    if state != self._states[member.rank]:
                        self._states[member.rank], self._changed[member.rank] = state, self._answered

    def _watch(self) -> None:
        """End this process if the main thread does not notice a loss within ENDING_SECONDS."""
        noticed, before = None, time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - before > SUSPENDED_SECONDS:  # this process was suspended; others may have been, too
                self._answered, self._changed = now, dict.fromkeys(self._changed, now)
            before, error = now, self.loss(SILENCE_SECONDS)
            noticed = None if error is None or self._works else noticed or now
            if error is not None and noticed is not None and now - noticed > ENDING_SECONDS:
                self.at_loss(error)
                if self._speaks():
                    print_error(self.ours.rank, error)
                os._exit(error.exit_code)

    def loss(self, silence: float) -> OtherRankError | None:
        """The error of another rank that has failed, or that has been silent for `silence` seconds. The same for
        torchrun, if it has the store."""
        world, now = self.ours.world, time.monotonic()
        states = [(member, self._states[member.rank]) for member in self.others]
        for member, state in states:
            if state.end is not None and state.end[0]:
                return failed_rank(str(member), world, state)
        silent = [each for each, state in states if not state.end and now - self._changed[each.rank] > silence]
        if silent and now - self._answered > silence:  # the store does not answer either
            if torchrun_has_store():
                return _lost(f"torchrun at {store_address()}, or its machine,", _silence(silence))
            silent = [member for member in silent if member.rank == 0] or silent
        return _lost(_names(silent, world), _silence(silence)) if silent else None

    def take_turn(self, number: int, leader: int = 0) -> None:
        """Wait until the rank `leader` has called this with the same number: without a limit, while that rank is alive.

        Raises: OtherRankError.
        """
        key = f"{key_of(leader)}/turn-{number}"
        if self.ours.rank == leader:
            self._own_store.set(key, "")
        pause = SHORTEST_SECONDS
        while not self._own_store.check([key]):  # the store's own wait prints two warnings a second
            time.sleep(pause)
            pause = min(2 * pause, POLLING_SECONDS)
            if (error := self.loss(SILENCE_SECONDS)) is not None:
                raise error

    def cause(self, error: BaseException) -> BaseException:
        """The error itself; or, if torch raised it because another rank has ended, the error that says so. Waits
        ENDING_SECONDS for the end of another rank to be known."""
        if not isinstance(error, RuntimeError) or isinstance(error, TunekitError):  # as torch's collectives raise
            return error
        deadline = time.monotonic() + ENDING_SECONDS + BEAT_SECONDS
        while time.monotonic() < deadline:
            known = self.loss(QUIET_SECONDS)
            if known is not None:
                return known
            gone = [member for member in self.others if self._has_ended(member)]
            if gone and time.monotonic() > deadline - ENDING_SECONDS:  # its error, if it wrote one, is known by now
                return _lost(_names(gone, self.ours.world), "its process has ended")
            time.sleep(BEAT_SECONDS / 10)
        behind = [each for each in self.others if self._states[each.rank].exchanges < self.exchanges]
        if behind and "timed out" in str(error).lower():
            return _late(behind, self.ours.world)
        return error

    def end(self, error: BaseException | None) -> None:
        """Tell the other ranks how this rank ends, and leave them. Sets `alone` of the error."""
        if error is None:
            leave_group(None)  # NCCL waits for all ranks here, so their loss must still be noticed
        self._ended.set()
        rank, deadline = self.ours.rank, time.monotonic() + ENDING_SECONDS
        with self._writing, contextlib.suppress(DistError):  # after the last beat
            if error is None:
                self._own_store.set(key_of(rank), State(self.ours, end=(0, "")).text())
        if error is not None:
            tell_end(self._own_store, rank, [], error, 0.0)  # first, since leaving can take long
            leave_group(error)
            silent = [each.rank for each in self.others if self._is_silent(each)]
            awaited = [each.rank for each in self.others if each.rank not in silent and (rank == 0 or each.rank == 0)]
            alone = tell_end(self._own_store, rank, awaited, error, deadline - time.monotonic())
            if isinstance(error, TunekitError):
                error.alone = alone and (not isinstance(error, OtherRankError) or self._speaks())

    def _is_silent(self, member: Member) -> bool:
        return time.monotonic() - self._changed[member.rank] > QUIET_SECONDS or self._has_ended(member)

    def _has_ended(self, member: Member) -> bool:
        return self._is_near(member) and has_ended(member.process)

    def _is_near(self, member: Member) -> bool:
        return member.host == self.ours.host

    def _speaks(self) -> bool:
        """Whether this rank prints for its machine that another rank is lost: the first rank there that is not lost."""
        lost = [each.rank for each in self.others if not self._states[each.rank].end and self._is_silent(each)]
        return self.ours.rank == min(
            each.rank for each in self.members if self._is_near(each) and each.rank not in lost
        )


def leave_group(error: BaseException | None) -> None:
    """Close the connections, so that the other ranks notice.

    NCCL waits for all ranks and for everything that is queued on the device. After an error this could take for ever:
    then the group is aborted, and this function returns after at most ENDING_SECONDS.
    """
    if not torch.distributed.is_initialized():
        return
    if error is None:
        torch.distributed.destroy_process_group()
        return
    leaving = threading.Thread(target=_abort_group, daemon=True)
    leaving.start()
    leaving.join(ENDING_SECONDS)


def _abort_group() -> None:
    try:
        torch.distributed.distributed_c10d._abort_process_group()
    except RuntimeError:  # a backend that cannot abort
        torch.distributed.destroy_process_group()


def _lost(name: str, why: str) -> OtherRankError:
    return OtherRankError(f"{name} is lost: {why}", "see its last output; continue with --resume")


def _silence(seconds: float) -> str:
    return f"no sign of life for {seconds:.0f} seconds"


def _names(members: list[Member], world: int) -> str:
    return f"{' and '.join(map(str, members))} of {world}"


def _late(members: list[Member], world: int) -> OtherRankError:
    where = " and ".join(f"process {member.process} on {member.host}" for member in members)
    what = f"{_names(members, world)} is alive, but has not exchanged values with this rank within torch's limit"
    return OtherRankError(what, f"look at {where} (py-spy dump shows where it waits); continue with --resume")
