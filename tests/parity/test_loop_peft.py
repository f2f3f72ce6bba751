"""The whole loop against transformers + peft by hand: loss, gradient norm, rate, final weights."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler

from tests.support.loop_case import Case, make_case, make_rows
from tunekit.contracts import IGNORED, StepBatches
from tunekit.recipe.training import TrainingSection
from tunekit.records import StepRecord

STEPS = 20


def reference_run(
    folder: Path, case: Case, training: TrainingSection
) -> tuple[list[float], list[float], list[float], dict]:
    """The same rows in the same steps, one big batch a step, the mean over its supervised tokens."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in case.adapter.trained().items():
            own[peft_name(name)].copy_(value)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = get_scheduler(training.scheduler, optimizer, case.parts.plan.warmup_steps, case.steps.count)
    losses, norms, rates = [], [], []
    for step in case.steps.after(0):
        loss = big_batch_loss(model, step, case)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm or float("inf"))))
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, norms, rates, own


def peft_name(name: str) -> str:
    return "base_model.model." + name.removesuffix(".weight") + ".default.weight"


def big_batch_loss(model: torch.nn.Module, step: StepBatches, case: Case) -> torch.Tensor:
    """Every row of the step by itself, unpadded and unpacked: the plainest possible forward."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in step.batches:
        for row in batch.rows:
            ids = torch.tensor(row.parts["ids"], dtype=torch.int64)[None]
            labels = torch.where(torch.tensor(row.parts["trained"]), ids[0], IGNORED)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
            total = total + torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum"
            )
            count += int((labels[1:] != IGNORED).sum())
    return total / count


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["padded", "packing", "end_to_end"])
@pytest.mark.parametrize(("size", "accumulation"), [(2, 5), (10, 1)])
def test_twenty_steps_equal_peft(tiny_llama: Path, size: int, accumulation: int, layout: str) -> None:
    training = TrainingSection(
        learning_rate=5e-3,
        warmup_ratio=0.2,
        weight_decay=0.01,
        micro_batch_size=size,
        gradient_accumulation_steps=accumulation,
        epochs=None,
        max_steps=STEPS,
        max_grad_norm=0.5,
    )
    rows = make_rows(63)
    case = make_case(tiny_llama, rows, training=training, **({} if layout == "padded" else {layout: True}))
    initial = {name: value.detach().clone() for name, value in case.adapter.trained().items()}
    losses, norms, rates, own = reference_run(tiny_llama, case, training)
    state = case.run()
    steps = [record for record in case.records if isinstance(record, StepRecord)]
    assert state.step == STEPS == len(steps)
    for record, loss, norm, rate in zip(steps, losses, norms, rates, strict=True):
        assert record.loss == pytest.approx(loss, rel=1e-5), record.step
        assert record.grad_norm == pytest.approx(norm, rel=1e-5), record.step
        assert record.learning_rate == pytest.approx(rate, rel=1e-9, abs=1e-15), record.step
    for name, value in case.adapter.trained().items():
        torch.testing.assert_close(value.detach(), own[peft_name(name)].detach(), rtol=1e-5, atol=1e-5)
    ours = torch.cat([(value.detach() - initial[name]).flatten() for name, value in case.adapter.trained().items()])
    theirs = torch.cat([(own[peft_name(name)].detach() - initial[name]).flatten() for name in initial])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
