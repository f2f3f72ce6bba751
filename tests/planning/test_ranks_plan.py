"""Ranks with unequal devices: the budget of each rank, and micro-batches by speed."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.support.ranks_case import LAYERS, differences, train_in_ranks, write_case
from tests.support.train_case import write_recipe
from tunekit.data.batching.steps import dealt
from tunekit.errors import TunekitError
from tunekit.plan import plan_verb
from tunekit.planning.notes import rank_notes
from tunekit.planning.plan import plan
from tunekit.planning.prepare import prepare
from tunekit.planning.ranks import plan_ranks, plan_together
from tunekit.recipe.load import LoadedRecipe, load_recipe
from tunekit.records import ExecutionSettings, Plan
from tunekit.training.begin import speeds_text
from tunekit.training.ranks import shared_execution

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_equal_ranks_take_turns(count: int, world: int) -> None:
    for speeds in ((), (2.5,) * world, (1.0,) * (world + 1)):
        for rank in range(world):
            assert dealt(count, rank, world, speeds) == tuple(range(rank, count, world))


@pytest.mark.parametrize("speeds", [(2.0, 1.0), (1.0, 3.0), (1.0, 0.01), (1.0, 2.5, 0.7)])
def test_faster_ranks_get_more_and_no_division_ends_earlier(speeds: tuple[float, ...]) -> None:
    world = len(speeds)
    for count in range(12):
        shares = [dealt(count, rank, world, speeds) for rank in range(world)]
        assert sorted(index for share in shares for index in share) == list(range(count))
        ends = max(len(share) / speed for share, speed in zip(shares, speeds, strict=True))
        held = sum(int(ends * speed * (1 - 1e-9)) for speed in speeds)  # what all ranks complete before this end
        assert not count or held < count


def test_the_speeds_of_ranks_are_stated_with_the_setting() -> None:
    assert speeds_text([5210.4, 5000.0]) == "tokens per second of each rank: 5,210, 5,000"
    assert speeds_text([5200.0, 2080.0]).endswith(
        "5,200, 2,080; with training.rank_speeds: [2.5, 1], faster ranks get more micro-batches"
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = write_tiny_llama(tmp_path / "m", layers=LAYERS)
    return write_recipe(tmp_path, model, data={"eval": None}, training={"micro_batch_size": 4})


def _plan(recipe: LoadedRecipe, rank: int, shared: ExecutionSettings | None, ranks: int = 2) -> Plan:
    return plan(prepare(recipe, CPU, ranks=ranks, rank=rank), shared)[0]


@pytest.fixture
def budget(recipe: Path) -> str:
    """A budget that only smaller micro-batches keep."""
    peak = _plan(load_recipe(recipe, ["memory.gradient_checkpointing=true"]), 0, None).peak_bytes.total
    return f"{int(peak * 1.05)}B"


def test_each_rank_plans_with_its_own_budget_and_all_with_the_same_micro_batches(recipe: Path, budget: str) -> None:
    tight = _plan(load_recipe(recipe, [f"memory.budget={budget}"]), 0, None)
    ample = _plan(load_recipe(recipe, ["memory.budget=8GiB"]), 0, None)
    assert tight.choice.micro_batch_size < ample.choice.micro_batch_size, "the budget is a limit"
    both = load_recipe(recipe, [f"memory.budget=[8GiB, {budget}]"])
    plans = plan_ranks(both, [CPU, CPU])
    assert [plan.choice.common for plan in plans] == [tight.choice.common] * 2
    assert [plan.budget_bytes for plan in plans] == [8 * 2**30, tight.budget_bytes]
    assert plans[1] == _replaced(tight, plans[1])
    assert plans[0].recipe["memory"]["budget"] == ["8GiB", budget]


def test_all_ranks_round_the_same_if_auto_means_something_else_on_another_machine(recipe: Path) -> None:
    """A machine without a C compiler decides, because kernels round differently."""
    loaded = load_recipe(recipe, ["training.kernels=auto", "model.dtype=bfloat16"])
    one, other = ExecutionSettings(4, kernels="native"), ExecutionSettings(4, kernels="none")
    assert shared_execution([one, other]) == other
    assert shared_execution([one, one]) == one
    sampling = [replace(one, sampling_batch_size=64), replace(other, sampling_batch_size=16)]
    assert shared_execution(sampling).sampling_batch_size == 16  # more would not fit into the second rank's memory
    for shared, has in ((one, "yes"), (other, "no")):
        plan = _plan(loaded, 0, shared)
        assert plan.choice.common == shared.common
        assert any(f"norms, SwiGLU and attention: {has}, so that all ranks" in note for note in plan.notes)


def test_all_ranks_sample_as_many_completions_together_as_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """plan.json has one number, which a resume gives to all ranks."""

    def make(prepared: Any, shared: ExecutionSettings | None, **_: Any) -> Any:
        size = prepared if shared is None else shared.sampling_batch_size
        return SimpleNamespace(choice=ExecutionSettings(4, sampling_batch_size=size)), None

    monkeypatch.setattr("tunekit.planning.ranks.plan", make)
    plans = plan_together(cast(Any, [64, 16]), list)
    assert [plan.choice.sampling_batch_size for plan, _ in plans] == [16, 16]


def test_all_ranks_shard_if_one_of_them_must(recipe: Path) -> None:
    """The others then plan again with a sharded base, and no rank reads its data again."""
    loaded = load_recipe(recipe, ["memory.gradient_checkpointing=false"])
    first, second = (prepare(loaded, CPU, ranks=2, rank=rank) for rank in range(2))
    needed = plan(first)[0].peak_bytes.total
    second = replace(second, resources=replace(second.resources, free_bytes=needed - 1))
    assert [plan(each)[0].choice.streaming for each in (first, second)] == ["off", "ranks"]
    plans = [plan for plan, _ in plan_together([first, second], list)]
    assert [plan.choice.streaming for plan in plans] == ["ranks", "ranks"]
    assert [plan.recipe["memory"]["sharding"] for plan in plans] == ["full", "auto"]


def test_a_plan_reads_no_file_and_no_device(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(recipe, ["memory.streaming=disk", "model.dtype=bfloat16"])
    first, second = prepare(loaded, CPU), prepare(loaded, CPU)
    made, _ = plan(first)  # which also imports what a plan needs

    def fail(*values: object, **named: object) -> None:
        raise AssertionError("a plan reads nothing")

    with monkeypatch.context() as patched:
        for name in ("os.stat", "os.open", "os.access", "builtins.open", "shutil.disk_usage", "mmap.mmap"):
            patched.setattr(name, fail)
        patched.setattr("tunekit.planning.prepared.available_bytes", fail)
        patched.setattr("tunekit.machine.cpu_times.busy_seconds", lambda: 0.0)  # a clock, which is a file on Linux
        again, _ = plan(second)
    assert again == made


def test_a_second_plan_simulates_nothing_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(load_recipe(recipe), CPU)
    first, _ = plan(prepared)
    monkeypatch.setattr("tunekit.planning.simulation.SimulatedRun._tracked", None)
    monkeypatch.setattr("tunekit.planning.prepared.available_bytes", None)
    assert plan(prepared)[0] == first
    assert plan(prepared, first.choice, may_recompute_more=True)[0].choice == first.choice


def _replaced(plan: Plan, other: Plan) -> Plan:
    """`plan` with the recipe and the notes of the other."""
    return replace(plan, recipe=other.recipe, notes=other.notes)


def test_plan_shows_the_memory_of_each_rank(recipe: Path, budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe.parent / "plan.json"
    plan_verb(load_recipe(recipe, [f"memory.budget=[8GiB, {budget}]"]), str(file), ranks=2)
    shown = capsys.readouterr().out
    assert "rank 0" in shown
    assert "rank 1: memory.budget" in shown
    first, second = json.loads(file.read_text("utf-8"))["peak_bytes_of_ranks"]
    assert second < int(budget.removesuffix("B")) < 8 * 2**30
    assert first >= second


def test_the_next_step_starts_as_many_processes_as_were_planned(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["memory.sharding=full", "training.rank_speeds=[1, 1]", "~memory.budget"]
    plan_verb(load_recipe(recipe, overrides), None, ranks=2, device="cpu")
    shown, command = capsys.readouterr().out, shlex.join([str(recipe), *overrides, "--device", "cpu"])
    assert f"next: torchrun --nproc-per-node 2 -m tunekit train {command}" in shown
    assert "recomputed in the backward pass: all, because gathered weights are on the device only" in shown
    with pytest.raises(TunekitError, match="rank 1: the smallest setting of this run needs"):
        plan_verb(load_recipe(recipe, ["memory.budget=[8GiB, 1MiB]"]), None, ranks=2)
    assert "next:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("memory.budget=[8GiB, 4GiB, 6GiB]", "memory.budget has 3 sizes, but the run has 2 processes: the smallest"),
        (
            "training.rank_speeds=[1, 2, 3]",
            "training.rank_speeds has 3 numbers, but the run has 2 processes: no effect",
        ),
    ],
)
def test_a_list_for_other_ranks_is_named(recipe: Path, override: str, text: str) -> None:
    plan = _plan(load_recipe(recipe, [override]), 1, None)
    assert any(note.startswith(text) for note in plan.notes)
    assert plan.budget_bytes in (None, 4 * 2**30)


@pytest.mark.parametrize(
    ("ranks", "override", "text"),
    [
        (
            2,
            "training.gradient_accumulation_steps=1",
            "1 micro-batch for 2 processes, so they are idle 50% of the time",
        ),
        (3, "training.gradient_accumulation_steps=4", "4 micro-batches for 3 processes, so they are idle 33% of the"),
        (3, "training.gradient_accumulation_steps=11", None),  # 8 %
        (2, "training.gradient_accumulation_steps=2", None),
        (1, "training.gradient_accumulation_steps=1", None),
    ],
)
def test_processes_without_work_are_named(recipe: Path, ranks: int, override: str, text: str | None) -> None:
    plan = _plan(load_recipe(recipe, [override, "training.micro_batch_size=2"]), 0, None, ranks)
    notes = [note for note in plan.notes if "idle" in note]
    assert len(notes) == (text is not None)
    if text is not None:
        assert notes[0].startswith(f"each step has {text}")
        cure = f"choose a multiple of {ranks} for training.gradient_accumulation_steps, with a smaller training.micro_"
        assert cure in notes[0]


@pytest.mark.parametrize(
    ("speeds", "count", "idle"),
    [((2, 1), 3, None), ((2, 1), 4, 17), ((3, 1), 2, 50), ((1000, 1), 8, 50), ((2, 1), 1, 50), ((2, 1, 1), 3, 25)],
)
def test_a_slow_process_without_work_is_named(
    speeds: tuple[float, ...], count: int, idle: int | None, recipe: Path
) -> None:
    """(2, 1) with 4 micro-batches: 3 take 1.5 units of time, 1 takes 1 unit. Three speeds for two processes count as
    equal speeds."""
    loaded = load_recipe(recipe, [f"training.rank_speeds={list(speeds)}"]).recipe
    notes = [note for note in rank_notes(loaded, ExecutionSettings(1, count, 64, shares=2)) if "idle" in note]
    assert len(notes) == (idle is not None)
    if idle is not None:
        assert f"idle {idle}% of the time; choose a {'larger' if len(speeds) == 2 else 'multiple'}" in notes[0]


def test_a_thousand_processes_are_not_idle_all_the_time(recipe: Path) -> None:
    (note,) = rank_notes(load_recipe(recipe).recipe, ExecutionSettings(1, 3, 64, shares=1000))
    assert "idle 99% of the time" in note


def test_dropout_depends_on_micro_batches_and_not_on_ranks(recipe: Path) -> None:
    """Masks are drawn for each micro-batch of a step, whichever rank computes it (tests/training/test_ranks.py)."""
    plan = _plan(load_recipe(recipe, ["adapter.dropout=0.1"]), 0, None)
    assert [note for note in plan.notes if note.startswith("dropout")] == [
        "dropout is on: with another micro-batch size, masks and losses differ slightly"
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_tasks_are_named_before_a_run_that_does_not_compute_them(recipe: Path, ranks: int) -> None:
    loaded = load_recipe(recipe, ["evaluation.tasks=[hellaswag]"]).recipe
    notes = [*rank_notes(loaded, ExecutionSettings(1, 8, 64, shares=ranks))]
    assert [note.partition(";")[0] for note in notes] == [
        "a run of several processes does not compute evaluation.tasks"
    ] * (ranks > 1)
    assert all(note.endswith("--tasks hellaswag") for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["off", "full"])
def test_unequal_ranks_give_the_curve_of_one(sharding: str, tmp_path: Path, shared: Path) -> None:
    recipe = write_case("sft", tmp_path, shared)
    (one,) = train_in_ranks(recipe, tmp_path / "one", world=1)
    assert one.code == 0, one.output
    more = ["training.rank_speeds=[1, 3]", "memory.budget=[900MiB, 2GiB]", f"memory.sharding={sharding}"]
    ends = train_in_ranks(recipe, tmp_path / "two", *more, before=partial(_count_micro_batches, tmp_path))
    assert [end.code for end in ends] == [0, 0], ends[0].output + ends[1].output
    largest = differences(tmp_path / "one", tmp_path / "two")
    assert max(value for name, value in largest.items() if "perplexity" not in name) <= 1e-5, largest
    first, second = (int((tmp_path / f"micro-batches.{rank}").read_text()) for rank in range(2))
    assert 2 * first < second, "the faster rank computes most micro-batches"


def _count_micro_batches(folder: Path) -> None:
    """In a rank's process: write how many micro-batches the rank trained on."""
    import os

    from tunekit.data.batching.steps import StoredSteps

    count, ours = [0], StoredSteps._make_step

    def counted(self: StoredSteps, *place: int) -> object:
        step = ours(self, *place)
        count[0] += len(step.batches)
        (folder / f"micro-batches.{os.environ['RANK']}").write_text(str(count[0]))
        return step

    StoredSteps._make_step = counted  # type: ignore[method-assign, assignment]


@pytest.mark.slow
def test_a_dry_run_measures_the_speed_of_each_rank(tmp_path: Path, shared: Path) -> None:
    recipe = write_case("sft", tmp_path, shared)
    ends = train_in_ranks(recipe, tmp_path / "two", dry_run=True)
    assert [end.code for end in ends] == [0, 0], ends[0].output + ends[1].output
    assert "tokens per second of each rank: " in ends[0].output
    assert not (tmp_path / "two").exists()
