"""The losses that depend on other rows have one value for an evaluation, whatever its batches: that of one step of all
its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objectives.test_dpo import base as base
from tests.objectives.test_dpo import pairs, write_recipe
from tests.objectives.test_kto import unpaired
from tests.support.plans import make_plan
from tunekit.adapters.attach import attach_adapter
from tunekit.contracts import StepBatches
from tunekit.errors import ResourceError
from tunekit.evaluation.evaluator import Evaluation, Evaluator, Queries
from tunekit.evaluation.scores import undisturbed
from tunekit.machine.devices import Devices
from tunekit.model.load import load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.load import load_recipe
from tunekit.tuned.model import ModelRun, TunedModel

CPU = torch.device("cpu")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo with sft": {"method": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "dpo with rpo_alpha": {"method": "dpo", "rpo_alpha": 0.7},
    "aot": {"method": "dpo", "loss_type": "aot", "beta": 2.0},
    "aot, reference kept": {"method": "dpo", "loss_type": ["aot", "sft"], "precompute_ref_log_probs": True},
    "cpo": {"method": "cpo"},
    "simpo": {"method": "simpo", "cpo_alpha": 0.5},
    "orpo": {"method": "orpo"},
    "kto": {"method": "kto", "beta": 2.0},
}


def evaluator_of(recipe: Path) -> Evaluator:
    """Of the recipe's evaluation rows, with an adapter whose weights are random."""
    _, prepared = make_plan(load_recipe(recipe), device=CPU)
    loaded = load_model(prepared.model, device=CPU)
    adapter = attach_adapter(loaded.net, LoraSettings(r=4), seed=0, head_name="lm_head")
    draw = torch.Generator().manual_seed(1)
    for parameter in adapter.trained().values():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    model, rows = TunedModel(loaded, adapter), prepared.rows
    assert rows.evaluation is not None
    return Evaluator(model, rows.objective, Devices(CPU), rows.evaluation, Queries(), EvaluationSection())


def in_batches(evaluator: Evaluator, size: int) -> Evaluation:
    return replace(evaluator, settings=EvaluationSection(batch_size=size)).evaluate()


def in_one_step(evaluator: Evaluator) -> float:
    """The mean loss of all rows as one step of training."""
    objective, rows = evaluator.objective, evaluator.rows
    batch = objective.rows.collate([[rows[number]] for number in range(len(rows))])
    with undisturbed(evaluator.model):
        step = objective.prepare_step(ModelRun(evaluator.model, objective.rows), StepBatches(0, 0.0, (0,), (batch,)))
        loss = objective.loss.loss(evaluator.model.output(step.batches[0].inputs), step.batches[0])
    return float(loss.total) / len(rows)


@contextmanager
def memory_for(evaluator: Evaluator, tokens: int) -> Iterator[None]:
    """A block in which batches of more padded tokens run out of memory."""
    output = evaluator.model.output

    def limited(inputs: dict[str, torch.Tensor]) -> Any:
        if inputs["input_ids"].numel() > tokens:
            raise MemoryError
        return output(inputs)

    evaluator.model.output = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        del evaluator.model.output


@pytest.mark.sampled(2)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_an_evaluation_is_one_step_of_all_its_rows(base: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    rows = unpaired(22) if objective["method"] == "kto" else pairs(22)
    evaluator = evaluator_of(write_recipe(tmp_path, base, rows, objective=objective, data={"eval": 0.5}))
    expected = in_one_step(evaluator)
    whole = in_batches(evaluator, 11)
    assert whole.metrics["loss"] == pytest.approx(expected, rel=1e-6)
    split: list[str] = []
    evaluator = replace(evaluator, on_split=split.append)
    largest = int(max(evaluator.rows.lengths))
    for size in (1, 4):
        found = in_batches(evaluator, size)
        assert found.metrics == pytest.approx(whole.metrics, rel=1e-5)
        assert found.sums.row_losses == pytest.approx(whole.sums.row_losses, rel=1e-4, abs=1e-6)
    with memory_for(evaluator, 2 * largest):
        halved = in_batches(evaluator, 8)
    assert split
    assert halved.metrics == pytest.approx(whole.metrics, rel=1e-5)
    with memory_for(evaluator, largest // 4), pytest.raises(ResourceError, match="single document"):
        in_batches(evaluator, 8)
