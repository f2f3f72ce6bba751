"""Text rows on composite models, against transformers + peft by hand, in the class that config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForMultimodalLM, get_scheduler

from tests.support.composite_case import SHAPES, language_model, write_composite
from tests.support.loop_case import Case, make_case, make_rows
from tunekit.contracts import IGNORED, StepBatches
from tunekit.model.parts import parts_apart
from tunekit.recipe.training import TrainingSection
from tunekit.records import StepRecord

STEPS = 10
TRAINING = TrainingSection(
    learning_rate=5e-3, micro_batch_size=2, gradient_accumulation_steps=2, epochs=None, max_steps=STEPS
)


def with_peft(folder: Path, case: Case, model_type: str) -> Any:
    """peft's model of the served class, with the adapter's initial values. Only the language model has an adapter."""
    net = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    linear = "|".join({target.name.rpartition(".")[2] for target in case.adapter.targets})
    entries = rf"{language_model(model_type)}\..*({linear})"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=entries, task_type="CAUSAL_LM")
    model = peft.get_peft_model(net, config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in case.adapter.trained().items():
            own[peft_name(name)].copy_(value)
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    assert {peft_name(name) for name in case.adapter.trained()} == trained
    return model


def peft_name(name: str) -> str:
    return "base_model.model." + name.removesuffix(".weight") + ".default.weight"


def step_loss(model: Any, step: StepBatches, model_type: str) -> torch.Tensor:
    """Every row of the step by itself, by the model's own forward."""
    net = model.base_model.model
    net = net.language_model if model_type == "llama4" else net  # the forward of the whole class fails in 5.24
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in [row for batch in step.batches for row in batch.rows]:
        ids = torch.tensor(row.parts["ids"], dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(row.parts["trained"]), ids[0], IGNORED)
        logits = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum"
        )
        count += int((labels[1:] != IGNORED).sum())
    return total / count


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", SHAPES)
def test_ten_steps_equal_peft_on_the_served_class(model_type: str, tmp_path: Path) -> None:
    folder = write_composite(model_type, tmp_path)
    case = make_case(folder, make_rows(63), training=TRAINING)
    assert parts_apart(case.model.base.net)
    assert not any(parameter.is_meta for parameter in case.model.base.net.parameters())
    model = with_peft(folder, case, model_type)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAINING.learning_rate, weight_decay=TRAINING.weight_decay)
    schedule = get_scheduler(TRAINING.scheduler, optimizer, case.parts.plan.warmup_steps, case.steps.count)
    losses, norms = [], []
    for step in case.steps.after(0):
        loss = step_loss(model, step, model_type)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, TRAINING.max_grad_norm)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    initial = {name: value.detach().clone() for name, value in case.adapter.trained().items()}
    case.run()
    assert case.losses == pytest.approx(losses, rel=1e-5)
    assert [record.grad_norm for record in case.records if isinstance(record, StepRecord)] == pytest.approx(norms, 1e-5)
    own = dict(model.named_parameters())
    ours = torch.cat([(value - initial[name]).flatten() for name, value in case.adapter.trained().items()])
    theirs = torch.cat([(own[peft_name(name)] - value).flatten() for name, value in initial.items()])
    assert float((ours - theirs).norm()) < 1e-4 * float(theirs.norm())
