"""The engine's scores before a step equal, bit for bit, what the step's own forward computes: with dropout, recomputed
or streamed layers, two stacks, and split micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.loop_case import make_case, make_rows
from tunekit.contracts import Batch, Loss, LossKind, ModelOutput, Objective, StepBatches
from tunekit.memory.splitting import Splitting
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import settings_class
from tunekit.recipe.training import TrainingSection

CASES: dict[str, dict[str, Any]] = {
    "resident": {},
    "recomputed": {"checkpointed": 2},
    "streamed": {"streaming": {"pass_size": 2}},
    "nf4": {"quantization": "nf4", "streaming": {"pass_size": 99}},
    "bfloat16": {"dtype": "bfloat16", "checkpointed": 1},
    "packed": {"packing": True},
    "prefix": {"method": "prefix"},
    "split": {"split": True},
    "split and streamed": {"split": True, "streaming": {"pass_size": 1}},
}


class NotedLoss(LossKind):
    """A loss that also keeps what `read` computes from each output."""

    def __init__(self, noted: LossKind, values: list[Tensor]) -> None:
        self.noted, self.values, self.units = noted, values, noted.units  # type: ignore[method-assign]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        self.values.append(read(output, batch).detach())
        return self.noted.loss(output, batch)


def read(output: ModelOutput, batch: Batch) -> Tensor:
    """The mean of each row's hidden states, and a draw that depends on the seed of the loss, (rows, D)."""
    assert output.hidden is not None
    positions = torch.repeat_interleave(torch.arange(len(batch.rows)), torch.tensor([row.size for row in batch.rows]))
    if len(batch.sequences) == len(batch.rows):
        return output.hidden.float().mean(dim=1) + torch.rand(1)
    flat = output.hidden.flatten(0, 1)[: len(positions)].float()  # (T, D)
    return torch.zeros(len(batch.rows), flat.shape[1]).index_add(0, positions, flat) + torch.rand(1)


def noted(objective: Objective, values: list[Tensor]) -> Objective:
    return replace(objective, loss=NotedLoss(objective.loss, values))


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_later_forward(name: str, tiny_llama: Path) -> None:
    settings = dict(CASES[name])
    splits, method = settings.pop("split", False), settings.pop("method", "lora")
    section = ModelSection(
        name_or_path=str(tiny_llama),
        dtype=settings.pop("dtype", "float32"),
        quantization=settings.pop("quantization", "none"),
    )
    training = TrainingSection(max_steps=3, epochs=None, micro_batch_size=4, gradient_accumulation_steps=3, seed=5)
    fields = {"num_virtual_tokens": 4, "init": "random"} if method == "prefix" else {"r": 4, "dropout": 0.3}
    adapter = settings_class("adapters", method).model_validate({"method": method, **fields})
    case = make_case(tiny_llama, make_rows(36), training=training, adapter=adapter, model=section, **settings)
    with torch.no_grad():  # another policy than the base, so that dropout matters
        for number, tensor in enumerate(case.adapter.trained().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)) / 8)
    step = list(case.steps.after(0))[1]
    splitting = Splitting(tokens=max(batch.padded for batch in step.batches)) if splits else None
    work = case.work(step, micro_batches=3, splitting=splitting)
    scores, again = (case.parts.engine.score(work, read) for _ in range(2))
    later: list[Tensor] = []
    with case.model.training_mode(True):
        [result] = case.parts.engine.run([replace(work, objective=noted(case.parts.objective, later))])
    result.checked()
    assert [len(each) for each in scores] == [len(batch.rows) for batch in step.batches]
    assert len(later) > len(scores) if splits else len(later) == len(scores)
    assert torch.equal(torch.cat(scores), torch.cat(later))
    assert torch.equal(torch.cat(scores), torch.cat(again))
    assert not any(each.requires_grad for each in scores)


def test_scores_of_another_step_have_other_dropout(tiny_llama: Path) -> None:
    """The test above could not fail if dropout drew nothing."""
    training = TrainingSection(max_steps=3, epochs=None, micro_batch_size=4, seed=5)
    adapter = settings_class("adapters", "lora").model_validate({"method": "lora", "r": 4, "dropout": 0.3})
    case = make_case(tiny_llama, make_rows(36), training=training, adapter=adapter)
    with torch.no_grad():
        for tensor in case.adapter.trained().values():
            tensor.fill_(0.05)
    step = next(case.steps.after(0))

    def hidden(output: ModelOutput, batch: Batch) -> Tensor:
        assert output.hidden is not None
        return output.hidden

    one, other = (case.parts.engine.score(case.work(each), hidden) for each in (step, replace(step, step=7)))
    assert not torch.equal(one[0], other[0])


def test_memory_that_runs_out_splits_the_scored_micro_batch(tiny_llama: Path) -> None:
    """The step that follows uses the same parts."""
    training = TrainingSection(max_steps=3, epochs=None, micro_batch_size=4, gradient_accumulation_steps=2, seed=5)
    case = make_case(tiny_llama, make_rows(36), training=training)
    step: StepBatches = next(case.steps.after(0))
    splitting = Splitting()
    largest, sizes = max(batch.padded for batch in step.batches), list[int]()

    def limited(output: ModelOutput, batch: Batch) -> Tensor:
        sizes.append(batch.padded)
        if batch.padded >= largest:
            raise torch.OutOfMemoryError("out of memory")
        return read(output, batch)

    work = case.work(step, micro_batches=2, splitting=splitting)
    scores = case.parts.engine.score(work, limited)
    assert splitting.tokens == largest
    assert [len(each) for each in scores] == [len(batch.rows) for batch in step.batches]
    later: list[Tensor] = []
    with case.model.training_mode(True):
        [result] = case.parts.engine.run([replace(work, objective=noted(case.parts.objective, later))])
    result.checked()
    assert torch.equal(torch.cat(scores), torch.cat(later))
