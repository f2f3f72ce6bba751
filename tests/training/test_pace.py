"""A run that has fewer processors than threads states it once; an adaptive run lowers its threads and records it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.loop_case import CPU, Case, make_case, make_rows
from tests.training.test_loop import assert_same_bits, training, weights
from tunekit.machine.cpu_times import CpuTimes
from tunekit.records import StepRecord
from tunekit.training import engine, pace
from tunekit.training.engine import Engine, StepAttempt
from tunekit.training.pace import missing_processors
from tunekit.training.state import checkpoint_facts

BUSY = CpuTimes(
    wall=6.0, process=6.0, main=3.0, waited=5.0, others=6.0
)  # a step of two threads next to another program
ALONE = CpuTimes(wall=6.0, process=11.0, main=5.8, waited=0.1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def case_with(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, steps: list[CpuTimes], **changes: Any
) -> tuple[Case, list[str]]:
    """A run whose steps take these times, and its warnings."""
    clock, spent = [CpuTimes()], iter(steps)

    def read() -> CpuTimes:  # at the start and at the end of each step
        return clock[0]

    def compute(self: Engine, attempt: StepAttempt) -> None:
        clock[0] += next(spent)
        plain(self, attempt)

    plain = Engine._compute
    monkeypatch.setattr(engine, "cpu_times", read)
    monkeypatch.setattr(pace, "processors", lambda: 2)
    monkeypatch.setattr(pace, "cpu_quota", lambda: None)
    case = make_case(tiny_llama, make_rows(23), training=training(max_steps=len(steps), **changes), device=CPU)
    monkeypatch.setattr(Engine, "_compute", compute)
    warnings: list[str] = []
    case.parts.session.console.warn = warnings.append  # type: ignore[method-assign]
    return case, warnings


@pytest.mark.parametrize(
    ("times", "threads", "missing"),
    [
        (ALONE, 2, 0),
        (BUSY, 2, 1),
        (CpuTimes(10.0, 4.5, 4.5, 5.0, 15.0), 1, 1),
        # eight threads, of which one shares its processor: seven would have one each
        (CpuTimes(10.0, 42.0, 6.0, 5.0), 8, 1),
        (CpuTimes(10.0, 30.0, 5.0, 36.0), 8, 4),
        # small products: 16 threads are idle most of the time, but no other program runs
        (CpuTimes(10.0, 20.0, 9.0, 0.1), 16, 0),
        # the main thread waits for a disk or for swapped memory
        (CpuTimes(10.0, 4.0, 2.0, 0.2), 2, 0),
        # a system that reports no waiting
        (CpuTimes(10.0, 11.0, 5.0, None, None), 2, 1),
        (CpuTimes(10.0, 20.0, 9.0, None), 16, 0),
        # an idle machine: the threads took turns on one processor, and other processes used 0.3 seconds
        (CpuTimes(16.0, 15.0, 8.0, 8.0, 0.3), 2, 0),
        (CpuTimes(16.0, 15.0, 8.0, 8.0, 12.0), 2, 1),
    ],
)
def test_missing_processors(times: CpuTimes, threads: int, missing: int) -> None:
    assert missing_processors(times, threads) == missing


@pytest.mark.drawn
@pytest.mark.usefixtures("two_threads")
def test_a_busy_machine_is_stated_once_with_the_cure(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, warnings = case_with(tiny_llama, monkeypatch, [ALONE] * 3 + [BUSY] * 9)
    state = case.run()
    what = "2 threads computed for 18 CPU seconds in 18 seconds: other programs use the processors"
    how = "close them, or start with training.threads: adaptive (or 1)"
    assert warnings == [f"step 6: {what}; {how}"]
    assert state.reactions == [{"probe": what, "action": how, "step": 6}]
    assert torch.get_num_threads() == 2
    assert {record.threads for record in case.records if isinstance(record, StepRecord)} == {None}


@pytest.mark.usefixtures("two_threads")
def test_a_short_burst_and_an_idle_machine_are_not_stated(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, warnings = case_with(tiny_llama, monkeypatch, [ALONE, BUSY, ALONE, ALONE, ALONE, ALONE, BUSY, BUSY])
    assert case.run().reactions == warnings == []


@pytest.mark.usefixtures("two_threads")
def test_more_threads_than_processors_are_stated(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, warnings = case_with(tiny_llama, monkeypatch, [BUSY] * 3)
    monkeypatch.setattr(pace, "cpu_quota", lambda: 0.5)
    case.run()
    assert "this process may use only 1 of the processors; start with training.threads: 1" in warnings[0]


@pytest.mark.usefixtures("two_threads")
def test_an_adaptive_run_lowers_its_threads_and_records_it(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, warnings = case_with(tiny_llama, monkeypatch, [BUSY] * 6, threads="adaptive")
    state = case.run()
    assert [record.threads for record in case.records if isinstance(record, StepRecord)] == [2, 2, 2, 1, 1, 1]
    assert [(reaction["step"], reaction["action"]) for reaction in state.reactions][:1] == [
        (3, "training.threads: adaptive continues with 1 thread")
    ]
    assert len(warnings) == len(state.reactions) == 1
    what = "2 threads computed for 18 CPU seconds in 18 seconds: other programs use the processors"
    assert state.reactions[0]["probe"] == what
    assert checkpoint_facts(case.optimizer, state, {})["threads"] == torch.get_num_threads() == 1


def test_times_of_this_process_and_of_other_systems(tmp_path: Path) -> None:
    for thread, text in (("1", "2000000000 500000000 7"), ("2", "1000000000 1500000000 3")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(text, encoding="ascii")
    assert engine.cpu_times(tmp_path).waited == 2.0
    assert engine.cpu_times(tmp_path / "absent").waited is None
    (tmp_path / "1" / "schedstat").write_text("0 0 0", encoding="ascii")  # a kernel that does not measure it
    (tmp_path / "2" / "schedstat").write_text("0 0 0", encoding="ascii")
    assert engine.cpu_times(tmp_path).waited is None
    start = engine.cpu_times()
    spent = engine.cpu_times().since(start)
    assert min(spent.wall, spent.process, spent.main) >= 0


@pytest.mark.usefixtures("two_threads")
def test_watching_changes_no_bit(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_case(tiny_llama, make_rows(23), training=training(max_steps=4), device=CPU)
    plain.run()
    case, warnings = case_with(tiny_llama, monkeypatch, [BUSY] * 4)
    case.run()
    assert len(warnings) == 1
    assert_same_bits(weights(case), weights(plain))
