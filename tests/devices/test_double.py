"""The simulated device itself: what is wrong is seen, and what is right is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.devices import plugin, simulated

CUDA = torch.device("cuda", 0)


def pinned(*values: float) -> Tensor:
    return torch.tensor(values).pin_memory()


def kinds() -> set[str]:
    """What kinds of fault were seen."""
    return {fault.partition(":")[0] for fault in plugin.faults()}


def test_values_are_those_of_the_cpu() -> None:
    left, right = torch.randn(5, 7), torch.randn(7, 3)
    product = left.to(CUDA) @ right.to(CUDA)
    assert product.device == CUDA
    assert torch.equal(product.cpu(), left @ right)


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_do_not_meet(other: str) -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ones(3, device=CUDA) + torch.ones(3, device=other)


def test_the_second_device_has_memory_streams_and_random_numbers_of_its_own() -> None:
    assert torch.cuda.device_count() == 2
    second, numbers = (
        torch.device("cuda", 1),
        [torch.cuda.memory_stats(index)["allocated_bytes.all.current"] for index in (0, 1)],
    )
    x = torch.ones(1000, device=second)
    assert x.device == (x + x).device == second
    now = [torch.cuda.memory_stats(index)["allocated_bytes.all.current"] for index in (0, 1)]
    assert [after - before for after, before in zip(now, numbers, strict=True)] == [0, 4096]
    assert torch.cuda.Stream(second).device == second
    assert torch.cuda.current_stream(second) != torch.cuda.current_stream(CUDA)
    with torch.cuda.device(second):
        assert torch.ones(2, device="cuda").device == second
    assert torch.ones(2, device="cuda").device == CUDA
    assert torch.equal(x.to(CUDA).cpu(), x.cpu())
    torch.manual_seed(0)
    states = [generator.get_state() for generator in torch.cuda.default_generators]
    torch.rand(3, device=second)
    assert [
        torch.equal(state, generator.get_state())
        for state, generator in zip(states, torch.cuda.default_generators, strict=True)
    ] == [True, False]


@pytest.mark.faulty
@pytest.mark.parametrize("index", [0, 1])
def test_the_stream_of_another_device_orders_nothing(index: int) -> None:
    second = torch.device("cuda", 1)
    source, x = pinned(1, 2, 3), torch.empty(3, device=second)
    with torch.cuda.stream(torch.cuda.Stream(second)):
        torch.cuda.current_stream(second).wait_stream(torch.cuda.default_stream(index))
        x.copy_(source, non_blocking=True)
    torch.cuda.synchronize(second)
    assert kinds() == ({"write after write"} if index == 0 else set())


@pytest.mark.faulty
@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (lambda x: x.add_(1), lambda x: x.sum(), "read after write"),
        (lambda x: x.sum(), lambda x: x.add_(1), "write after read"),
        (lambda x: x.fill_(1), lambda x: x.fill_(2), "write after write"),
    ],
)
@pytest.mark.parametrize("ordered", [True, False])
def test_two_streams_are_ordered_by_an_event_alone(first: Any, second: Any, kind: str, ordered: bool) -> None:
    x, stream = torch.ones(3, device=CUDA), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    first(x)
    with torch.cuda.stream(stream):
        if ordered:
            stream.wait_stream(torch.cuda.default_stream())
        second(x)
        x.record_stream(stream)
    assert kinds() == (set() if ordered else {kind})


@pytest.mark.faulty
@pytest.mark.parametrize("ordered", [True, False])
def test_the_first_write_comes_after_the_allocation(ordered: bool) -> None:
    """New memory may be that of a tensor which is still computed on the stream that allocates it."""
    stream, source, x = torch.cuda.Stream(), pinned(1, 2, 3), torch.empty(3, device=CUDA)
    with torch.cuda.stream(stream):
        if ordered:
            stream.wait_stream(torch.cuda.default_stream())
        x.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert kinds() == (set() if ordered else {"write after write"})
    assert x.tolist() == [1, 2, 3]


@pytest.mark.faulty
@pytest.mark.parametrize("recorded", [True, False])
def test_memory_is_not_given_back_while_another_stream_reads_it(recorded: bool) -> None:
    x, stream, target = torch.ones(3, device=CUDA), torch.cuda.Stream(), torch.empty(3, pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        target.copy_(x, non_blocking=True)
        if recorded:
            x.record_stream(stream)
    del x
    assert kinds() == (set() if recorded else {"freed while read"})
    torch.cuda.synchronize()
    assert (target.tolist() == [1, 1, 1]) == recorded


@pytest.mark.faulty
def test_memory_that_nobody_wrote_is_not_read() -> None:
    assert torch.empty(3, device=CUDA).sum().isnan().item()
    assert kinds() == {"unset memory is read"}


@pytest.mark.parametrize("waits", [torch.cuda.synchronize, lambda: torch.zeros(1, device=CUDA).item()])
def test_a_copy_to_the_host_is_seen_after_a_wait_for_it(waits: Any) -> None:
    x, target, before = torch.ones(3, device=CUDA), torch.zeros(3).pin_memory(), torch.cuda.Event()
    before.record()
    target.copy_(x, non_blocking=True)
    x.add_(1)
    assert target.isnan().all()
    before.synchronize()
    assert target.isnan().all()
    waits()
    assert target.tolist() == [1, 1, 1]


def test_a_copy_back_sees_what_the_device_sent_before_it() -> None:
    x, waiting = torch.ones(3, device=CUDA), torch.empty(3, pin_memory=True)
    waiting.copy_(x, non_blocking=True)
    again = waiting.to(CUDA, non_blocking=True)
    waiting.copy_(x * 2, non_blocking=True)
    assert again.tolist() == [1, 1, 1]
    assert waiting.tolist() == [2, 2, 2]


@pytest.mark.faulty
@pytest.mark.parametrize("waits", [True, False])
def test_the_host_does_not_write_what_a_copy_has_yet_to_read(waits: bool) -> None:
    source, x = pinned(1, 2, 3), torch.empty(3, device=CUDA)
    x.copy_(source, non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    source.fill_(9)
    assert x.tolist() == ([1, 2, 3] if waits else [9, 9, 9])
    assert kinds() == (set() if waits else {"the host writes what a copy to the device has yet to read"})


def test_what_the_host_waits_for_is_counted() -> None:
    x, target = torch.ones(3, device=CUDA), torch.zeros(3).pin_memory()
    torch.cuda.set_sync_debug_mode("warn")
    target.copy_(x, non_blocking=True)
    x.nonzero()
    x.to("cpu")
    x.copy_(torch.zeros(3), non_blocking=True)
    torch.cuda.set_sync_debug_mode("default")
    x.sum().item()
    copies = ["a copy to the host into pageable memory", "a copy to the device from pageable memory"]
    assert simulated.DOUBLE.waits() == ["aten::nonzero", *copies]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_ends_at_the_fraction() -> None:
    def numbers() -> list[int]:
        statistics = torch.cuda.memory_stats()
        return [statistics[f"{kind}_bytes.all.current"] for kind in ("allocated", "requested")]

    before = numbers()
    torch.cuda.set_per_process_memory_fraction((before[0] + 2**20) / simulated.DOUBLE.properties.total_memory)
    try:
        x = torch.ones(1000, device=CUDA)
        assert [now - then for now, then in zip(numbers(), before, strict=True)] == [4096, x.nbytes]
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**20, device=CUDA)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
