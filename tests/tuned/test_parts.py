"""Preparing a step when memory runs out: less is computed at once, nothing else is repeated, and no value changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.test_dpo import base as base
from tests.objectives.test_dpo import pairs, write_recipe
from tests.objectives.test_grpo import write_prompts
from tests.objectives.test_kto import unpaired
from tests.support.data_case import objective_of
from tests.support.pair_case import make_rows
from tests.support.plans import make_plan
from tests.support.train_case import records, tensors_of, train, without_times
from tunekit.adapters.attach import attach_adapter
from tunekit.companions.base import load_companions
from tunekit.companions.rewards import RewardFunctions
from tunekit.contracts import Batch, ModelOutput, Objective, StepBatches
from tunekit.errors import ResourceError
from tunekit.model.load import load_model
from tunekit.model.text.decoder import Decoder
from tunekit.objectives.losses.answers import predicted
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.dpo import DpoSettings
from tunekit.records import ExecutionSettings
from tunekit.tuned.model import ModelRun, TunedModel
from tunekit.tuned.network import prepare_network

CPU = torch.device("cpu")


def model_of(base: Path, streaming: str) -> TunedModel:
    """The base with an adapter whose weights are random, so that it is not its own reference."""
    section = ModelSection(name_or_path=str(base), dtype="float32")
    loaded = load_model(section, device=CPU, streamed=streaming != "off")
    attach = partial(attach_adapter, loaded.net, LoraSettings(r=4), seed=0, head_name="lm_head")
    model, draw = (
        prepare_network(loaded, ExecutionSettings(streaming=streaming), attach),
        torch.Generator().manual_seed(1),
    )
    assert model.adapter is not None
    for parameter in model.adapter.trained().values():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return model


def limit_memory(model: TunedModel, tokens: int, together: int = 100) -> list[int]:
    """Make larger batches run out of memory in the middle of their forward, and more batches together before it.
    Returns a list of the sizes that failed."""
    failed, scores = list[int](), model.scores
    layer = model.base.family.layers(model.base.net)[-1][1]

    def check(module: object, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[:2].numel() > tokens:
            failed.append(inputs[0].shape[:2].numel())
            raise MemoryError("no room")

    def limited(batches: Sequence[Batch], read: Any) -> list[Tensor]:
        if len(batches) > together:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return scores(batches, read)

    layer.register_forward_pre_hook(check)
    model.scores = limited  # type: ignore[method-assign]
    return failed


def prepared(model: TunedModel, objective: Objective, batches: Sequence[Batch], on_split: Callable[[str], None]) -> Any:
    run = ModelRun(model, objective.rows, on_split=on_split)
    return objective.prepare_step(run, StepBatches(0, 0.0, tuple(range(len(batches))), tuple(batches))).batches


@pytest.mark.parametrize("streaming", ["off", "host"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_halves_of_a_batch_have_its_scores(base: Path, tmp_path: Path, method: str, streaming: str) -> None:
    """DPO's reference, and KTO's reference and policy of mismatched answers, in batches of 4, 3 and 1 rows."""
    rows = unpaired(12) if method == "kto" else pairs(12)
    recipe = write_recipe(tmp_path, base, rows, objective={"method": method, "precompute_ref_log_probs": False})
    _, planned = make_plan(load_recipe(recipe), device=CPU)
    objective, train_rows = planned.rows.objective.laid_out(False), planned.rows.train
    groups = [range(4), range(4, 7), range(7, 8)]
    batches = [objective.rows.collate([[train_rows[number]] for number in group]) for group in groups]
    whole = prepared(model_of(base, streaming), objective, batches, lambda size: pytest.fail("it fits"))
    model, sizes = model_of(base, streaming), list[str]()
    failed = limit_memory(model, max(batch.padded for batch in batches) // 2, together=2)
    parts = prepared(model, objective, batches, sizes.append)
    assert failed
    assert any(size.startswith("a batch of 4 x ") for size in sizes)
    assert any(size.endswith(" batches together") for size in sizes) == (streaming == "host")
    for batch, expected in zip(parts, whole, strict=True):
        assert batch.targets.keys() == expected.targets.keys()
        for name, value in batch.targets.items():
            torch.testing.assert_close(value, expected.targets[name], rtol=1e-5, atol=1e-5)
    limit_memory(model, 1)
    with pytest.raises(ResourceError, match="out of memory for a single document of size"):
        prepared(model, objective, batches, lambda size: None)


def test_a_teacher_reads_halves_of_a_batch(base: Path, tmp_path: Path) -> None:
    """Its hidden states at the supervised tokens of four rows in one micro-batch."""
    write_recipe(tmp_path, base, pairs(1), objective={"method": "distill", "teacher": str(base)}, data={"eval": None})
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "say {"very " * at}{at}"}}\n' for at in range(4)))
    _, planned = make_plan(load_recipe(tmp_path / "recipe.yaml"), device=CPU)
    objective, rows = planned.rows.objective, planned.rows.train
    batch = objective.rows.collate([[rows[number]] for number in range(4)])
    model, sizes = model_of(base, "off"), list[str]()
    model.companions = load_companions(objective, CPU)
    (teacher,) = model.companions.values()
    (whole,) = prepared(model, objective, [batch], lambda size: pytest.fail("it fits"))
    failed = limit_memory(vars(teacher)["_model"], batch.padded // 2)
    (parts,) = prepared(model, objective, [batch], sizes.append)
    assert failed
    assert sizes
    assert whole.targets["teacher"].shape[0] == batch.supervised
    torch.testing.assert_close(parts.targets["teacher"], whole.targets["teacher"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_values_of_tokens_keep_their_order(base: Path, rows: int) -> None:
    """One value (of two columns) for each token: first of all chosen answers, then of all rejected answers."""
    objective = objective_of(DpoSettings())
    batch = objective.rows.collate([[row] for row in make_rows()[:rows]])

    def read(output: ModelOutput, batch: Batch) -> Tensor:
        return torch.stack([predicted(output, batch), -predicted(output, batch)], dim=1)  # (N, 2)

    def counts(batch: Batch) -> list[int]:
        return batch.targets["counts"].tolist()  # type: ignore[no-any-return]

    model = model_of(base, "off")
    (whole,) = ModelRun(model, objective.rows).score([batch], read, counts)
    limit_memory(model, batch.padded // rows)
    (parts,) = ModelRun(model, objective.rows).score([batch], read, counts)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_fewer_completions_at_a_time_are_the_same(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of a run, with an evaluation. Rewards are computed once for each step, and the report states it."""
    score, start, calls = RewardFunctions.score, Decoder.__init__, list[int]()

    def counted(self: RewardFunctions, completions: Any) -> Any:
        calls.append(len(completions))
        return score(self, completions)

    def limited(self: Decoder, *values: Any, slots: int, **named: Any) -> None:
        if slots > 2:
            raise MemoryError("no room")
        start(self, *values, slots=slots, **named)

    def trained(name: str) -> Path:
        objective = {"num_generations": 3, "max_completion_length": 6, "num_iterations": 2, "beta": 0.1}
        steps = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 1, "save_steps": 4, "eval_steps": 4}
        recipe = write_prompts(tmp_path / name, base, objective=objective, training=steps, data={"eval": 4 / 24})
        return train(recipe)

    monkeypatch.setattr(RewardFunctions, "score", counted)
    whole = trained("whole")
    expected = calls.copy()
    calls.clear()
    monkeypatch.setattr(Decoder, "__init__", limited)
    parts = trained("parts")
    assert calls == expected
    assert without_times(records(parts)) == without_times(records(whole))
    assert tensors_of(parts) == tensors_of(whole)
    probes = [each["probe"] for each in json.loads((parts / "report.json").read_text())["reactions"]]
    assert "a batch of 12 completions ran out of memory while a step was prepared" in probes
    assert "a batch of 6 completions ran out of memory while a step was prepared" in probes


def test_a_single_completion_that_does_not_fit_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = model_of(base, "off"), list[int]()

    def generate(*values: Any, batch_size: int, **named: Any) -> None:
        sizes.append(batch_size)
        raise MemoryError("no room")

    monkeypatch.setattr("tunekit.tuned.model.generate_texts", generate)
    run, tokenizer = ModelRun(model, objective_of().rows), objective_of().rows.tokenizer  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"out of memory \(no room\)"):
        run.generate(tokenizer, [[5, 6]] * 7, max_new_tokens=3, batch_size=64, stop_ids=[2])
    assert sizes == [64, 3, 1]
