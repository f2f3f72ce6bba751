"""Mistakes put into what copies and reads beside the computation: each is seen by the simulated device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices import plugin
from tests.support.loop_case import Case, make_case, make_rows
from tests.training.test_loop import training, weights
from tunekit.errors import NumericsError
from tunekit.memory import copies
from tunekit.memory.copies import StreamCopier
from tunekit.memory.offload import BoundaryStore
from tunekit.training import loop
from tunekit.training.optimizers import Optimizer
from tunekit.training.readings import start_reading

pytestmark = pytest.mark.faulty
CUDA = torch.device("cuda", 0)
HOST, DISK = ({"streaming": {"tier": tier, "poison": False}} for tier in ("host", "disk"))
OFFLOAD = {"checkpointed": 4}
start, pass_on, mark = StreamCopier.start, StreamCopier._pass_on, StreamCopier.mark
clear = Optimizer.zero_gradients


def case_of(folder: Path, **settings: Any) -> Case:
    store = BoundaryStore(StreamCopier(CUDA), 0, 0) if "checkpointed" in settings else None
    return make_case(folder, make_rows(11), training=training(max_steps=3), device=CUDA, store=store, **settings)


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a run that keeps everything on the device."""
    case = case_of(folder)
    case.run()
    return case.losses, weights(case)


@pytest.mark.parametrize("settings", [HOST, DISK, OFFLOAD], ids=["host", "disk", "offload"])
def test_without_a_mistake_nothing_is_seen(folder: Path, settings: dict[str, Any], expected: Any) -> None:
    case = case_of(folder, **settings)
    case.run()
    assert plugin.faults() == []
    assert case.losses == expected[0]
    assert all(torch.equal(own, expected[1][name]) for name, own in weights(case).items())


def wait_for_nothing(self: StreamCopier, copy: Any) -> None:
    if isinstance(copy, Future):
        copy.result()


def reuse_the_ring_at_once(self: StreamCopier, target: Any, source: Any) -> None:
    self._free = [None] * copies.RING_PARTS
    pass_on(self, target, source)


def mark_too_early(self: StreamCopier) -> Any:
    """The mark before this one: a slot is thought free while its layer is computed."""
    before, self.late = getattr(self, "late", None), mark(self)  # type: ignore[attr-defined]
    return before


def let_go_too_early(self: BoundaryStore, left: int) -> None:
    while len(self._leaving) > left:
        self._copier.wait(self._leaving.popleft()[0])  # the tensor is gone before the call


def clear_elsewhere(self: Optimizer) -> None:
    with torch.Stream(CUDA):
        clear(self)


MISTAKES: dict[str, tuple[dict[str, Any], Any, str, Callable[..., Any]]] = {
    "a layer is computed before it is there": (HOST, StreamCopier, "wait", wait_for_nothing),
    "so is one from a file": (DISK, StreamCopier, "wait", wait_for_nothing),
    "a copy does not wait for what is computed in its slot": (
        HOST, StreamCopier, "start", lambda self, pairs, after: start(self, pairs, None),
    ),
    "an input leaves before it is computed": (
        OFFLOAD, StreamCopier, "start", lambda self, pairs, after: start(self, pairs, None),
    ),
    "an input is used before it is back": (OFFLOAD, StreamCopier, "wait", wait_for_nothing),
    "memory is given to others while it is copied": (
        OFFLOAD, BoundaryStore, "_let_go", lambda self, left: self._leaving.clear(),
    ),
    "a part of the ring is filled while it is copied": (DISK, StreamCopier, "_pass_on", reuse_the_ring_at_once),
    "a slot is given away one layer too early": (HOST, StreamCopier, "mark", mark_too_early),
    "what leaves is gone before its copy is waited for": (OFFLOAD, BoundaryStore, "_let_go", let_go_too_early),
    "gradients are cleared beside what adds to them": ({}, Optimizer, "zero_gradients", clear_elsewhere),
    "numbers are read before they are there": (
        {}, loop, "start_reading", lambda *given: replace(start_reading(*given), copied=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(folder: Path, name: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, place, function, mistake = MISTAKES[name]
    monkeypatch.setattr(place, function, mistake)
    case, error = case_of(folder, **settings), None
    try:
        case.run()
    except NumericsError as found:  # memory that is not set is NaN
        error = found
    assert plugin.faults() or error is not None
