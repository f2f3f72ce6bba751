"""Mistakes put into what copies and reads beside the computation: each is seen by the simulated device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from tests.devices import plugin
from tests.support.loop_case import Case, make_case, make_rows
from tests.training.test_loop import training, weights
from tunekit.errors import NumericsError
from tunekit.memory import copies
from tunekit.memory.copies import StreamCopier
from tunekit.memory.offload import BoundaryStore
from tunekit.model.attention import documents
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.records import StepRecord
from tunekit.training import run as run_module
from tunekit.training.optimizers import Optimizer
from tunekit.training.step_numbers import start_numbers

pytestmark = pytest.mark.faulty
CUDA = torch.device("cuda", 0)
HOST, DISK = ({"streaming": {"tier": tier, "poison": False}} for tier in ("host", "disk"))
OFFLOAD = {"checkpointed": 4}
start, pass_on, mark, begin = StreamCopier.start, StreamCopier._pass_on, StreamCopier.mark, StreamCopier.__init__
clear = Optimizer.zero_gradients


def case_of(folder: Path, **settings: Any) -> Case:
    settings = {"device": CUDA} | settings
    store = BoundaryStore(StreamCopier(settings["device"]), 0, 0) if "checkpointed" in settings else None
    return make_case(folder, make_rows(11), training=training(max_steps=3), store=store, **settings)


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
        {}, run_module, "start_numbers", lambda *given: replace(start_numbers(*given), copied=None),
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


def on_the_host(folder: Path, **settings: Any) -> Case:
    """The same run on the CPU."""
    case = make_case(folder, make_rows(11), training=training(max_steps=3), device=torch.device("cpu"), **settings)
    case.run()
    return case


def norms(case: Case) -> list[float | None]:
    return [record.grad_norm for record in case.records if isinstance(record, StepRecord)]


def hidden(case: Case) -> torch.Tensor:
    """Of a sequence of two documents: (1, T, D)."""
    inputs = {
        "input_ids": torch.arange(3, 33)[None],
        "position_ids": torch.cat([torch.arange(20), torch.arange(10)])[None],
    }
    with torch.no_grad():
        return case.model.hidden(inputs).float().cpu()


def seed_the_host_alone(seed: int) -> torch.Generator:
    return torch.default_generator.manual_seed(seed)


def attend_without_a_window(*tensors: Any, window_size: Any, **named: Any) -> Any:
    return varlen_attn(*tensors, **named)


def is_near(own: Any, reference: Any, allowed: float) -> bool:
    return all(
        torch.allclose(torch.as_tensor(left), torch.as_tensor(right), rtol=allowed, atol=allowed)
        for left, right in zip(own, reference, strict=True)
    )


@pytest.mark.parametrize("mistaken", [False, True])
def test_attention_to_what_is_to_come_is_seen(folder: Path, mistaken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSection(name_or_path=str(folder), dtype="bfloat16")
    expected = hidden(on_the_host(folder, model=model, packing=True))
    case = case_of(folder, model=model, packing=True)
    assert case.model.base.facts.attention == documents.VARLEN
    if mistaken:
        monkeypatch.setattr(documents, "_varlen", lambda: attend_without_a_window)
    case.run()
    assert is_near(hidden(case), expected, 0.1) != mistaken


@pytest.mark.parametrize("mistaken", [False, True])
def test_gradients_that_are_not_unscaled_are_seen(
    folder: Path, mistaken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = norms(on_the_host(folder))
    case = case_of(folder, model=ModelSection(name_or_path=str(folder), dtype="float16"))
    if mistaken:
        monkeypatch.setattr(Optimizer, "scale_gradients", lambda self, factor: None)
    case.run()
    assert is_near(norms(case), expected, 0.02) != mistaken


@pytest.mark.parametrize("mistaken", [False, True])
def test_a_seed_that_does_not_reach_the_device_is_seen(
    folder: Path, mistaken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = LoraSettings(r=4, alpha=8.0, dropout=0.5)
    expected = weights(on_the_host(folder, adapter=adapter))
    if mistaken:
        monkeypatch.setattr(torch, "manual_seed", seed_the_host_alone)
    case = case_of(folder, adapter=adapter)
    case.run()
    own = [value.cpu() for value in weights(case).values()]
    assert is_near(own, expected.values(), 1e-5) != mistaken


@pytest.mark.parametrize("settings", [{}, HOST, OFFLOAD], ids=["resident", "host", "offload"])
def test_a_run_on_the_second_device_is_the_same(folder: Path, settings: dict[str, Any], expected: Any) -> None:
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_stats(0)["requested_bytes.all.peak"]
    case = case_of(folder, device=torch.device("cuda", 1), **settings)
    case.run()
    assert plugin.faults() == []
    assert torch.cuda.memory_stats(0)["requested_bytes.all.peak"] == before, "nothing was put on the first device"
    assert case.losses == expected[0]


def made_for_the_first(self: StreamCopier, device: torch.device, *more: Any) -> None:
    begin(self, CUDA, *more)


def read_after_the_first(*given: Any) -> Any:
    return replace(start_numbers(*given), copied=torch.cuda.current_stream(CUDA).record_event())


@pytest.mark.parametrize(
    ("settings", "place", "function", "mistake"),
    [
        (OFFLOAD, StreamCopier, "__init__", made_for_the_first),
        ({}, run_module, "start_numbers", read_after_the_first),
    ],
    ids=["copies", "numbers"],
)
def test_the_index_of_another_device_is_seen(
    folder: Path, settings: Any, place: Any, function: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, function, mistake)
    with pytest.raises((RuntimeError, NumericsError)):
        case_of(folder, device=torch.device("cuda", 1), **settings).run()
