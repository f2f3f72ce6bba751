"""A memory budget: the fastest setting that fits, the same steps whatever is chosen, and a refusal that helps."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.planning.test_plan import plan_of
from tests.support.data_case import Rows, objective_of, settings
from tests.support.plans import make_plan
from tests.support.train_case import kill_self, records, result_bytes, train_in_child, write_recipe
from tunekit.data.batching.steps import StoredSteps
from tunekit.machine.memory import limit_bytes
from tunekit.memory.offload import BoundaryStore, make_store
from tunekit.planning import cheaper
from tunekit.planning.execution import TOLERANCE, SearchSpace, fastest, relative_time, smaller_micro_batches
from tunekit.planning.forecast import largest_batch
from tunekit.planning.memory import MARGIN, trial_reason, usable_bytes
from tunekit.recipe.load import load_recipe
from tunekit.records import ExecutionSettings

MIB = 2**20
TIME = partial(relative_time, device="cpu", layers=12, row_tokens=300, step_tokens=4800, head_share=0.2)


def some_peak(choice: ExecutionSettings) -> int:
    """Falls with every axis, and not below what loading takes."""
    rows, layers = choice.micro_batch_size or 1, choice.checkpointed_layers
    weights = 400 if choice.streaming == "off" else 60
    return max(
        300 if choice.streaming == "off" else 0, weights + rows * (40 * (12 - layers) + choice.logits_chunk_tokens // 4)
    )


@pytest.mark.parametrize("seed", range(60))
def test_no_other_setting_that_fits_is_faster(seed: int) -> None:
    draw = random.Random(seed)
    rows = draw.choice([1, 2, 4, 6, 8])
    space = SearchSpace(
        micro_batches=smaller_micro_batches(rows, 2),
        logits_chunks=draw.choice([[256], [512, 128], [341, 85]]),
        gradient_checkpointing=draw.choice(["auto", "auto", "auto", True, False, 5]),
        layers=12,
        tiers=draw.choice([("off",), ("off", "host")]),
    )
    limit = draw.randrange(50, 5000)
    asked: list[ExecutionSettings] = []

    def excess(choice: ExecutionSettings) -> int:
        asked.append(choice)
        return some_peak(choice) - limit

    found = fastest(space, TIME, excess)
    every = {tier: [choice for start in space.grid(tier) for choice in space.deeper(start)] for tier in space.tiers}
    for tier, choices in every.items():
        assert some_peak(space.smallest(tier)) == min(map(some_peak, choices))
        fitting = [choice for choice in choices if some_peak(choice) <= limit]
        if fitting:  # of the first tier in which anything fits
            assert found in fitting
            assert TIME(found) <= min(map(TIME, fitting)) / (1 - TOLERANCE)
            break
    else:
        assert found is None
    assert len(set(asked)) <= 12 + 4 * sum(len(space.grid(tier)) for tier in space.tiers), "a peak costs a second"


def test_time_grows_with_everything_that_saves_memory() -> None:
    base = ExecutionSettings(4, 2, 512)
    for slower in (
        replace(base, micro_batch_size=2, gradient_accumulation_steps=4),
        replace(base, logits_chunk_tokens=64),
        replace(base, checkpointed_layers=1),
    ):
        assert TIME(slower) > TIME(base)
    every, none = replace(base, checkpointed_layers=12), base
    assert TIME(every) - TIME(none) == pytest.approx(0.5)
    streamed = replace(base, streaming="host")
    assert TIME(replace(streamed, pass_micro_batches=2)) < TIME(streamed)


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"epochs": None, "max_steps": 11}])
@pytest.mark.parametrize("written", [(4, 3), (6, 1), (3, 2)])
def test_smaller_micro_batches_leave_every_step_its_rows(written: tuple[int, int], changes: dict[str, Any]) -> None:
    rows = Rows([2 + (7 * index) % 30 for index in range(61)])
    given = settings(micro_batch_size=written[0], gradient_accumulation_steps=written[1], **({"epochs": 2.0} | changes))
    expected = [_rows_of(step) for step in StoredSteps(rows, objective_of().rows, given).after(0)]
    options = smaller_micro_batches(*written)
    assert options[0] == written
    assert options[-1] == (1, written[0] * written[1])
    for size, count in options:
        cut = replace(given, micro_batch_size=size, gradient_accumulation_steps=count)
        steps = StoredSteps(rows, objective_of().rows, cut)
        found = list(steps.after(0))
        assert [_rows_of(step) for step in found] == expected
        assert max(len(batch.lengths) for step in found for batch in step.batches) <= (size or 0)
    assert smaller_micro_batches(None, 5) == [(None, 5)]


def _rows_of(step: Any) -> list[tuple[int, ...]]:
    return [tuple(row.number for row in rows) for batch in step.batches for rows in batch.sequences]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Rows of one length, packs that matter beside what the process itself takes."""
    return write_recipe(
        tmp_path_factory.mktemp("budget"),
        tiny_llama,
        rows=400,
        data={"max_length": 512, "packing": True},
        adapter={"dropout": 0.0},
        training={"micro_batch_size": 4, "gradient_accumulation_steps": 1, "epochs": 1.0},
        evaluation={"batch_size": 2},
    )


def budget_for(total: int) -> str:
    """A budget whose part beside the margin is just `total`."""
    return f"memory.budget={-(-total * 1000 // (1000 - round(1000 * MARGIN['cpu'])))}B"


@pytest.mark.drawn
def test_a_budget_that_everything_fits_changes_nothing(recipe: Path) -> None:
    plain, _ = plan_of(recipe)
    plan, _ = plan_of(recipe, "memory.budget=10GiB")
    assert not plan.refusals
    for name in ("choice", "peak_bytes", "steps"):
        assert getattr(plan, name) == getattr(plain, name)
    assert plan.choice.checkpointed_layers == 0
    assert plan.tries_longest_batch
    assert plan.budget_bytes == 10 * 2**30
    assert any("memory.budget 10GiB" in note for note in plan.notes)


@pytest.mark.drawn
def test_within_a_budget_rows_go_before_recomputation(recipe: Path) -> None:
    plain, _ = plan_of(recipe)
    half, _ = plan_of(recipe, "training.micro_batch_size=2", "training.gradient_accumulation_steps=2")
    one, _ = plan_of(recipe, "training.micro_batch_size=1", "training.gradient_accumulation_steps=4")
    assert plain.peak_bytes.total > half.peak_bytes.total > one.peak_bytes.total
    plan, prepared = plan_of(recipe, budget_for(half.peak_bytes.total))
    choice = plan.choice
    assert (choice.micro_batch_size, choice.gradient_accumulation_steps, choice.checkpointed_layers) == (2, 2, 0)
    assert plan.peak_bytes == half.peak_bytes
    assert (plan.steps, plan.supervised_tokens) == (plain.steps, plain.supervised_tokens)
    assert prepared.batch_settings.micro_batch_size == 2
    assert len(prepared.largest_batch.sequences) == 2
    assert any("(the same rows as 1 of size 4)" in note for note in plan.notes)
    every, _ = plan_of(
        recipe,
        "training.micro_batch_size=1",
        "training.gradient_accumulation_steps=4",
        "memory.gradient_checkpointing=true",
    )
    assert every.peak_bytes.total < one.peak_bytes.total
    tight, _ = plan_of(recipe, budget_for(one.peak_bytes.total - 1))
    assert tight.choice.micro_batch_size == 1
    assert tight.choice.checkpointed_layers > 0 or tight.choice.logits_chunk_tokens < plain.choice.logits_chunk_tokens
    assert tight.peak_bytes.total < one.peak_bytes.total
    assert not tight.refusals


@pytest.mark.drawn
def test_what_the_recipe_writes_is_obeyed(recipe: Path) -> None:
    plain, _ = plan_of(recipe)
    budget = budget_for(plain.peak_bytes.total - 1)
    fixed, _ = plan_of(recipe, budget, "memory.gradient_checkpointing=1")
    assert fixed.choice.checkpointed_layers == 1
    assert any("memory.gradient_checkpointing fixes the recomputed layers" in note for note in fixed.notes)
    by_tokens = ("~training.micro_batch_size", "training.micro_batch_tokens=2048")
    plan, _ = plan_of(recipe, *by_tokens, budget)
    assert plan.choice.micro_batch_size is None
    assert plan.choice.gradient_accumulation_steps == 1
    assert any("micro_batch_tokens is not reduced" in note for note in plan.notes)


LITTLE = ", which is not enough alone"


@pytest.mark.parametrize(
    ("saved", "limit", "said"),
    [
        (
            {"a": 0.5, "b": 0, "c": -9},
            99,
            "no setting would save enough memory; use a smaller base model, or more memory",
        ),
        ({"a": 5, "b": 0}, 50, f"the only change that saves memory: a: 1 saves 5.0 MiB (needs 95.0 MiB{LITTLE})"),
        (
            {"a": 5, "b": 0, "c": 30},
            70,
            f"the cheapest changes: a: 1 saves 5.0 MiB (needs 95.0 MiB{LITTLE}), c: 1 saves 30.0 MiB (needs 70.0 MiB)",
        ),
        (
            {"a": 5, "b": 10},
            50,
            f"the cheapest changes: a: 1 saves 5.0 MiB (needs 95.0 MiB{LITTLE}), b: 1 saves 10.0 MiB "
            f"(needs 90.0 MiB{LITTLE}); together they need 85.0 MiB",
        ),
        (
            {"a": 5, "b": 40, "c": 30, "d": 50},
            70,
            "the cheapest changes: b: 1 saves 40.0 MiB (needs 60.0 MiB), c: 1 saves 30.0 MiB (needs 70.0 MiB), "
            "d: 1 saves 50.0 MiB (needs 50.0 MiB)",
        ),
    ],
)
def test_the_cheapest_changes_that_save_memory(
    monkeypatch: pytest.MonkeyPatch, saved: dict[str, float], limit: int, said: str
) -> None:
    """Changes of a peak of 100 MiB, from cheap to costly; the choice stands for the peak."""
    changes = [
        (key, 1, lambda old, less=less: replace(old, execution=old.execution - int(less * MIB)))
        for key, less in saved.items()
    ]
    monkeypatch.setattr(cheaper, "_changes", lambda *given: iter(changes))
    forecast = SimpleNamespace(peak=lambda choice: SimpleNamespace(total=choice))
    prepared: Any = SimpleNamespace(forecast=forecast)
    assert cheaper.cheapest_changes(prepared, cast(Any, None), cast(Any, 100 * MIB), 100 * MIB, limit * MIB) == said


@pytest.mark.slow
def test_an_impossible_budget_names_changes_that_do_what_they_say(recipe: Path) -> None:
    written = ("memory.budget=55MiB", "memory.streaming=off")
    plan, _ = plan_of(recipe, *written, "memory.gradient_checkpointing=false", "adapter.r=32")
    (refusal,) = plan.refusals
    assert (refusal.key, refusal.exit_code) == ("memory.budget", 4)
    assert "\n" not in refusal.message
    found = re.findall(r"([a-z_.]+): (\S+) saves ([0-9.]+ MiB) \(needs ([0-9.]+) MiB", refusal.message)
    assert 1 <= len(found) <= 3
    assert found[0][0] == "memory.gradient_checkpointing", "the cheapest first"
    smallest = float(re.findall(r"needs ([0-9.]+) MiB, but", refusal.message)[0])
    for key, value, saved, needs in found:
        assert smallest - float(saved.split()[0]) == pytest.approx(float(needs), abs=0.2)
        overrides = {"memory.gradient_checkpointing": "false", "adapter.r": "32"} | {key: value}
        changed, _ = plan_of(recipe, *written, *(f"{name}={given}" for name, given in overrides.items()))
        (again,) = changed.refusals
        new = float(re.findall(r"needs ([0-9.]+) MiB, but", again.message)[0])
        assert new == pytest.approx(float(needs), abs=0.3), f"{key}: {value} is what it was said to be"


@pytest.mark.drawn
def test_a_head_in_parts_is_a_change_where_the_vocabulary_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where it leaves the device; of what a tiny vocabulary would save nothing is said."""
    for name in ("available_bytes", "total_bytes"):
        monkeypatch.setattr(f"tunekit.planning.prepared.{name}", lambda device: 2**33)
    monkeypatch.setattr("tunekit.planning.tiers.base_obstacle", lambda *_: None)  # of a smaller vocabulary
    messages = []
    for vocabulary in (267, 60_000):
        folder = write_tiny_llama(tmp_path / str(vocabulary), layers=1)
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": vocabulary}
        (folder / "config.json").write_text(json.dumps(config))  # no weight is read
        recipe = write_recipe(tmp_path / f"for-{vocabulary}", folder, rows=8, data={"eval": None})
        overrides = ("memory.budget=1MiB", "memory.streaming=off", "memory.gradient_checkpointing=true")
        plan, _ = make_plan(load_recipe(recipe, overrides), device=torch.device("cuda"))
        assert plan.peak_bytes.activations > 0, "float32 with grouped heads has torch's plain attention"
        messages += [refusal.message for refusal in plan.refusals if refusal.key == "memory.budget"]
    assert ["memory.streamed_head: true saves" in message for message in messages] == [False, True]


def test_a_change_that_plan_would_refuse_is_not_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of a base that cannot be streamed, shorter rows where longer ones are an error."""
    for name in ("available_bytes", "total_bytes"):
        monkeypatch.setattr(f"tunekit.planning.prepared.{name}", lambda device: 2**33)
    folder = write_tiny_llama(tmp_path / "base", layers=1)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 60_000}
    (folder / "config.json").write_text(json.dumps(config))  # no weight is read
    recipe = write_recipe(tmp_path / "recipe", folder, rows=8, data={"eval": None, "excess_length": "error"})
    overrides = ("memory.budget=1MiB", "memory.streaming=off", "memory.gradient_checkpointing=true")
    messages = []
    for obstacle in (None, "it has none of the names"):
        monkeypatch.setattr("tunekit.planning.tiers.base_obstacle", lambda *_, obstacle=obstacle: obstacle)
        plan, _ = make_plan(load_recipe(recipe, overrides), device=torch.device("cuda"))
        messages += [refusal.message for refusal in plan.refusals if refusal.key == "memory.budget"]
    assert ["memory.streamed_head: true saves" in message for message in messages] == [True, False]
    assert not any("data.max_length" in message for message in messages)


def test_inputs_of_layers_are_offloaded_only_if_the_host_has_room_for_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_any_store(setting: str | bool, *values: Any, **options: Any) -> BoundaryStore:
        return make_store(setting is not False, *values, **options)  # `auto` without its lowest sizes

    monkeypatch.setattr("tunekit.tuned.network.make_store", make_any_store)
    monkeypatch.setattr("tunekit.planning.prepared.total_bytes", lambda device: 2**33)
    monkeypatch.setattr("tunekit.planning.prepared.is_here", lambda device: True)
    plans = {}
    for setting, room in (("auto", 2**33), ("auto", 2**10), ("true", 2**10)):
        free = {"cuda": 2**33, "cpu": room}
        monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device, free=free: free[device.type])
        overrides = ("memory.gradient_checkpointing=true", f"memory.activation_offload={setting}")
        plans[setting, room], _ = make_plan(load_recipe(recipe, overrides), device=torch.device("cuda"))
    choices = [plan.choice.activation_offload for plan in plans.values()]
    assert choices == ["auto", False, True]
    notes = [" ".join(plan.notes) for plan in plans.values()]
    assert ["the inputs of recomputed layers stay on the device: with them, " in note for note in notes] == [
        *(False, True, False)
    ]
    refused = [[refusal.key for refusal in plan.refusals] for plan in plans.values()]
    assert refused == [[], [], ["memory.activation_offload"]]
    monkeypatch.setattr(
        "tunekit.planning.prepared.is_here", lambda device: False
    )  # this machine's memory is irrelevant
    plan, _ = make_plan(load_recipe(recipe, overrides), device=torch.device("cuda"))
    assert not plan.refusals


def test_a_budget_beyond_what_is_free_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = plan_of(recipe)
    monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device: plain.peak_bytes.total - 1)
    plan, _ = plan_of(recipe, "memory.budget=10GiB")
    assert [(refusal.key, refusal.exit_code) for refusal in plan.refusals] == [("memory.budget", 4)]
    assert plan.choice.checkpointed_layers == 0, "the budget decides, not what is free at the moment"


def test_what_is_free_decides_nothing_that_changes_a_bit(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = plan_of(recipe)
    monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device: plain.peak_bytes.total - 1)
    plan, _ = plan_of(recipe)
    assert plan.choice.checkpointed_layers > 0
    assert replace(plan.choice, checkpointed_layers=0) == plain.choice


def test_a_margin_of_a_gpus_memory_is_left_free() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [usable_bytes(device, 1000, 10**9) for device in (cpu, gpu)] == [900, 950]
    assert [usable_bytes(device, None, 1000) for device in (cpu, gpu)] == [1000, 950]
    assert usable_bytes(gpu, None, None) == float("inf")


def test_the_longest_batch_is_tried_where_it_can_tell_something() -> None:
    cpu = torch.device("cpu")
    assert trial_reason(torch.device("cuda"), 1, 10**12, None)[0]
    assert trial_reason(cpu, 1, 10**12, 5)[0]
    assert trial_reason(cpu, 81, 100, None)[0]
    assert not trial_reason(cpu, 79, 100, None)[0]
    assert not trial_reason(cpu, 79, None, None)[0]


def test_a_gpu_s_allocator_fails_at_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr("tunekit.machine.memory.total_bytes", lambda device: 80 if device.type == "cuda" else None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: asked.append(fraction))
    limit_bytes(torch.device("cuda"), 24)
    limit_bytes(torch.device("cuda"), 100)
    limit_bytes(torch.device("cpu"), 24)
    assert asked == [0.3, 1.0]


def run_plan(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "plan.json").read_text())
    return found


def half_batches(recipe: Path) -> str:
    half, _ = plan_of(recipe, "training.micro_batch_size=2", "training.gradient_accumulation_steps=2")
    return budget_for(half.peak_bytes.total)


@pytest.mark.drawn
def test_a_run_within_a_budget_is_the_run_without(recipe: Path, tmp_path: Path) -> None:
    budget = half_batches(recipe)
    for name, overrides in (("plain", ()), ("within", (budget,))):
        ended = train_in_child(recipe, tmp_path / name, *overrides)
        assert ended.code == 0, ended.output
    assert [run_plan(tmp_path / name)["choice"]["micro_batch_size"] for name in ("plain", "within")] == [4, 2]
    losses = [[entry["loss"] for entry in records(tmp_path / name) if "loss" in entry] for name in ("plain", "within")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    report = json.loads((tmp_path / "within" / "report.json").read_text())
    assert report["budget_bytes"] == run_plan(tmp_path / "within")["budget_bytes"]
    assert report["seconds"]["try"] > 0
    assert "budget of" in (tmp_path / "within" / "report.md").read_text()


@pytest.mark.drawn
def test_a_resume_keeps_to_the_plan_of_the_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is predicted or free when it goes on."""
    budget = half_batches(recipe)
    whole = train_in_child(recipe, tmp_path / "whole", budget, "training.save_steps=2")
    assert whole.code == 0, whole.output

    def die_at_step_three() -> None:
        from tunekit.artifacts import metrics_log

        append = metrics_log.append_line

        def watched(path: Path, line: str) -> None:
            append(path, line)
            if json.loads(line).get("step") == 3:
                kill_self()

        metrics_log.append_line = watched

    run = tmp_path / "run"
    ended = train_in_child(recipe, run, budget, "training.save_steps=2", before=die_at_step_three)
    assert ended.code < 0, ended.output

    def predict_otherwise() -> None:
        from tunekit.planning.forecast import Forecast

        peak = Forecast.peak
        Forecast.peak = lambda self, choice: replace(peak(self, choice), total=10 * MIB)  # type: ignore[method-assign]

    ended = train_in_child(recipe, run, budget, "training.save_steps=2", resume=True, before=predict_otherwise)
    assert ended.code == 0, ended.output
    assert run_plan(run)["choice"]["micro_batch_size"] == 2
    assert result_bytes(run) == result_bytes(tmp_path / "whole")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packing", [False, True])
def test_batches_by_tokens_are_planned_by_their_largest(seed: int, packing: bool) -> None:
    draw = random.Random(seed)
    rows = Rows([draw.randint(2, 60) for _ in range(97)])
    given = settings(
        micro_batch_size=None, micro_batch_tokens=150, packing=packing, seed=seed, epochs=3.0, max_length=64
    )
    steps = StoredSteps(rows, objective_of().rows, given)
    sizes = [batch.inputs["input_ids"].numel() for step in steps.after(0) for batch in step.batches]
    assert largest_batch(steps, rows, objective_of().rows, given).padded == max(sizes)
    assert len(set(sizes)) > 3, "they are uneven"
    assert np.max(sizes) <= 150


def test_where_scores_are_kept_a_long_row_counts_more_than_its_tokens(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, adapter={"dropout": 0.0}, data={"max_length": 512, "eval": None})
    texts = ["a" * 300, *(["b" * 10] * 60)]
    with (tmp_path / "train.jsonl").open("w") as file:
        for text in texts:
            answer = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": answer}) + "\n")
    by_tokens = ("~training.micro_batch_size", "training.micro_batch_tokens=400", "model.dtype=float32")
    for attention, rows in (("sdpa", 2), ("eager", 1)):
        _, prepared = plan_of(recipe, *by_tokens, f"model.attention={attention}")
        batch = prepared.largest_batch
        count = len(batch.rows)  # rows may lie end to end
        assert (count >= rows) if rows > 1 else (count == 1 and batch.tokens > 300), (attention, batch.lengths)
