"""How ranks meet and watch each other, without a second process: what is compared, and what a lost rank causes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunekit.errors import DataError, InputError, OtherRankError, ResourceError
from tunekit.machine import meeting, peers
from tunekit.machine.devices import Devices
from tunekit.machine.meeting import (
    VARIABLES,
    Meeting,
    Member,
    State,
    check_equal,
    check_own_gpus,
    gpu_of_nccl,
    key_of,
    place_in_group,
)
from tunekit.machine.peers import Peers

VERSIONS = {"tunekit": "1.0", "torch": "2.13", "transformers": "5.24"}
MEMBERS = [Member(rank, 2, f"node-{rank}", 0, "cpu", VERSIONS) for rank in (0, 1)]
GROUP = dict(zip(VARIABLES, ("1", "0", "2", "node-0", "29500"), strict=True))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Peers]]:
    """Both ranks of a run, in this process."""
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(peers, "ENDING_SECONDS", 0.05)
    store: Any = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for member in MEMBERS:
        store.set(key_of(member.rank), State(member).text())
    both = [Peers(Meeting(store, MEMBERS, member)) for member in MEMBERS]
    with both[0].undisturbed(), both[1].undisturbed():
        yield both
    for each in both:
        each.end(None)


def loss(watching: Peers, silence: float) -> OtherRankError:
    deadline = time.monotonic() + 10
    while (error := watching.loss(silence)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return error


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"WORLD_SIZE": "3"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ""),
        ({"WORLD_SIZE": "", "LOCAL_RANK": ""}, ""),
        ({"RANK": ""}, "RANK is not set"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR and MASTER_PORT is not set"),
        ({"MASTER_PORT": "port"}, "MASTER_PORT is 'port', not a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, which is not a port"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2, so ranks are 0 to 1"),
    ],
)
def test_a_launcher_sets_all_variables(
    changed: dict[str, str], text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**GROUP, **changed}.items():
        monkeypatch.setenv(name, value)
    if not text:
        assert place_in_group() == ((1, 3) if text is None else None)
        return
    with pytest.raises(InputError, match=text):
        place_in_group()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The port of rank 0, at which another program listens. This process is rank 1."""
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        for name, value in {**GROUP, **place}.items():
            monkeypatch.setenv(name, value)
        yield listener


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_another_program_at_the_port_is_noticed(answer: bytes | None, port: socket.socket) -> None:
    def serve() -> None:
        with contextlib.suppress(OSError):  # when the test ends
            while True:
                connection, _ = port.accept()
                connection.sendall(answer or b"")
                connection.close()

    if answer is not None:
        threading.Thread(target=serve, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"MASTER_PORT\) does not answer as rank 0 of 2; set MASTER_PORT to a free"
    ) as caught:
        meeting.meet("cpu")
    assert time.monotonic() - started < 20
    assert caught.value.alone, "there is no store in which the other ranks could read it"


def test_a_rank_waits_for_a_store_that_starts_later(port: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    port.close()
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 30.0)
    stores: list[Any] = []
    number = int(os.environ["MASTER_PORT"])
    later = threading.Timer(
        0.5,
        lambda: stores.append(torch.distributed.TCPStore("127.0.0.1", number, is_master=True, wait_for_workers=False)),
    )
    later.start()
    store = meeting._open_store((1, 2), 60)
    later.join()
    stores[0].set("key", "value")
    assert store.get("key") == b"value"
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ResourceError, match=r"rank 1 of 2 did not reach rank 0 at 127\.0\.0\.1:1 .* within 1 seconds"):
        meeting._open_store((1, 2), 1)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (replace(MEMBERS[1], world=3), r"WORLD_SIZE is 3 on rank 1 \(on node-1\), but 2 on rank 0 \(on node-0\)"),
        (replace(MEMBERS[1], device="cuda"), "the device is cuda on rank 1"),
        (replace(MEMBERS[1], versions={**VERSIONS, "torch": "2.9"}), "torch is 2.9 on rank 1 .*, but 2.13 on rank 0"),
    ],
)
def test_a_rank_that_differs_is_named(other: Member, text: str) -> None:
    check_equal(MEMBERS)
    with pytest.raises(InputError, match=text):
        check_equal([MEMBERS[0], other])


def test_the_error_of_a_rank_reaches_the_others_with_its_exit_code(pair: list[Peers]) -> None:
    pair[1].end(DataError("the image is not there", "mend it", file="7.png"))
    error = loss(pair[0], 60)
    assert str(error) == "rank 1 (on node-1) of 2 has failed: 7.png: the image is not there; mend it"
    assert error.exit_code == 2
    assert pair[0].cause(RuntimeError("Connection closed by peer")).args == error.args
    bug = ValueError("odd")
    assert pair[0].cause(bug) is bug


def test_a_rank_that_fails_tells_the_others_and_does_not_wait_for_its_device(
    pair: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would wait for ever for collectives that other ranks do not join."""
    ends: list[Any] = []

    def hang(*_: object) -> None:
        ends.append(State.read(pair[1]._own_store.get(key_of(1))).end)
        time.sleep(3)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", hang)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_abort_process_group", hang)
    started = time.monotonic()
    pair[1].end(DataError("the image is not there", "mend it"))
    assert time.monotonic() - started < 2
    assert ends == [(2, "the image is not there; mend it")]
    assert str(loss(pair[0], 60)).startswith("rank 1 (on node-1) of 2 has failed")
    ended = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(pair[0]._ended.is_set()))
    pair[0].end(None)
    assert ended == [False], "while it leaves, the loss of another rank is noticed"


FAILED = "rank 1 (on node) of 2 has failed: no file"


@pytest.mark.parametrize(
    ("ours", "printed", "host", "prints"),
    [
        ("no file", "no file", "node", False),
        ("no file", FAILED, "node", False),
        (FAILED, "no file", "node", False),
        ("no file", "no folder", "node", True),
        ("no file", "no file", "another", False),
        ("no file", FAILED, "another", True),  # each machine has its own terminal
    ],
)
def test_ranks_of_a_machine_print_an_error_once_and_the_main_rank_has_time_for_it(
    ours: str, printed: str, host: str, prints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the main rank as soon as another rank has ended."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    store: Any = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"]) as main:
        state = State(Member(0, 2, "node", main.pid, "cpu", VERSIONS), end=(2, printed))
        store.set(key_of(0), state.text())
        assert meeting.tell_end(store, 1, [0], InputError(ours), 60) == prints
        assert (main.poll() is not None) == (not prints and host == "node")
        main.kill()


def test_a_silent_rank_is_lost_and_one_that_has_finished_is_not(pair: list[Peers]) -> None:
    pair[1]._ended.set()
    assert str(loss(pair[0], 0.2)).startswith("rank 1 (on node-1) of 2 is lost: no sign of life")
    pair[1].end(None)
    deadline = time.monotonic() + 10
    while pair[0].loss(0.2) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_torchrun_is_named_and_no_rank_is_blamed(pair: list[Peers], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process has the store, so no rank sees another one any more."""
    place = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    pair[1]._ended.set()
    assert str(loss(pair[0], 0.2)).startswith("rank 1 (on node-1) of 2 is lost"), "the store answers"
    pair[0]._ended.set()
    text = "torchrun at node-0:29500, or its machine, is lost: no sign of life for 0 seconds; see its last output"
    deadline = time.monotonic() + 10
    while not str(loss(pair[0], 0.2)).startswith(text):
        assert time.monotonic() < deadline


def test_a_rank_waits_for_its_turn_without_a_word(pair: list[Peers], capfd: pytest.CaptureFixture[str]) -> None:
    waiting = threading.Thread(target=pair[1].take_turn, args=(1,))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    pair[0].take_turn(1)
    waiting.join(10)
    assert not waiting.is_alive()
    assert capfd.readouterr() == ("", "")


def test_a_process_that_waits_inside_torch_is_ended(
    pair: list[Peers], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, ended, lost = [], threading.Event(), []

    def leave(code: int) -> None:
        pair[1]._works = 1  # the thread stops here
        codes.append(code)
        ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    pair[1].at_loss = lost.append
    pair[0].end(DataError("the image is not there"))
    assert not ended.wait(0.2), "the main thread is at work"
    pair[1]._works = 0
    assert ended.wait(10)
    assert codes == [2]
    assert str(lost[0]) == "rank 0 (on node-0) of 2 has failed: the image is not there"
    assert capsys.readouterr().err == f"rank 1: {lost[0]}\n"


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, ["work", "turn of 0"]),
        (1, ["turn of 0", "work"]),
        (2, ["turn of 0", "work", "turn of 2"]),
        (3, ["turn of 0", "turn of 2", "work"]),
    ],
)
def test_one_process_of_each_machine_fills_its_caches(
    rank: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    devices = Devices.__new__(Devices)
    devices.rank, devices.world, devices.turns = rank, 4, 0
    devices.before_exchange = lambda: None
    devices.hosts = ["node-0", "node-0", "node-1", "node-1"]
    others: Any = SimpleNamespace(take_turn=lambda number, leader=0: events.append(f"turn of {leader}"))
    monkeypatch.setattr(Devices, "peers", others)
    monkeypatch.setattr(Devices, "from_main", lambda self, value: value)

    def work() -> str:
        events.append("work")
        return "rows"

    assert devices.main_first(work) == "rows"
    assert events == expected


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["rank 0 (on a)", "rank 1 (on a)", "rank 2 (on a)"]
    with pytest.raises(
        InputError, match=r"rank 0 \(on a\) and rank 2 \(on a\) have the same GPU, .*--nproc-per-node gpu"
    ):
        check_own_gpus(["x", "y", "x"], names)
    check_own_gpus(["x", "y", "z"], names)
    check_own_gpus(["", "", ""], names)
    properties = SimpleNamespace(uuid="x")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for backend, gpu in (("nccl", "x"), ("cpu:gloo,cuda:nccl", "x"), ("gloo", "")):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda name=backend: name)
        assert gpu_of_nccl(torch.device("cuda:0")) == gpu
    assert gpu_of_nccl(torch.device("cpu")) == ""
