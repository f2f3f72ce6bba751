"""Every method of the LoRA family through the real loop: four steps on a tiny llama, and a resume in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.loop_case import Case, make_case, make_rows
from tunekit.recipe.adapters.adalora import AdaloraSettings
from tunekit.recipe.reading.names import settings_class
from tunekit.recipe.training import TrainingSection

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "lora_fa": ("lora_fa", {}),
    "gaussian": ("lora", {"start": "gaussian"}),
    "orthogonal": ("dora", {"start": "orthogonal"}),
    "copies": ("lora", {"modules_to_save": ("lm_head", "embed_tokens")}),
    "tokens": ("lora", {"trainable_token_indices": {"embed_tokens": tuple(range(3, 64)), "lm_head": (9, 4)}}),
    "second layer": ("dora", {"layers_to_transform": (1,)}),
}


def start(folder: Path, case: str, learning_rate: float = 0.02) -> Case:
    method, own = CASES[case]
    adapter = settings_class("adapters", method)(**{"r": 4, "alpha": 8.0, **own})
    training = TrainingSection(
        learning_rate=learning_rate, scheduler="constant", warmup_steps=0, epochs=4, micro_batch_size=2,
        gradient_accumulation_steps=2, weight_decay=0.1,
    )  # fmt: skip
    return make_case(folder, make_rows(4, shortest=8, longest=15), training=training, adapter=adapter)  # one row set


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES)
def test_four_steps_train_everything_and_lower_the_loss(tiny_llama: Path, case: str) -> None:
    trained, still = start(tiny_llama, case), start(tiny_llama, case, learning_rate=0.0)
    before = {name: tensor.clone() for name, tensor in trained.adapter.state(("trained",)).items()}
    trained.run()
    still.run()
    assert len(trained.losses) == len(still.losses) == 4
    assert trained.losses[-1] < still.losses[-1] - 0.01
    same = [name for name, tensor in trained.adapter.state(("trained",)).items() if torch.equal(tensor, before[name])]
    assert same == []


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES)
def test_a_resume_changes_no_bit(tiny_llama: Path, case: str) -> None:
    whole, first, second = (start(tiny_llama, case) for _ in range(3))
    whole.run()
    second.run_after_a_stop(first, 2)
    assert first.losses + second.losses == whole.losses
    ours, theirs = second.adapter.state(), whole.adapter.state()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_penalty_counts_once_per_step_however_it_is_cut(tiny_llama: Path) -> None:
    found = []
    for size, accumulation, streaming in ((8, 1, None), (2, 4, None), (2, 4, {"pass_size": 2})):
        section = TrainingSection(micro_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1)
        adapter = AdaloraSettings(init_r=4, target_r=2, target_modules=("q_proj",))
        case = make_case(tiny_llama, make_rows(8), training=section, adapter=adapter, streaming=streaming)
        window = next(case.windows.windows(0))
        units = torch.stack([case.parts.objective.loss.units(batch) for batch in window.batches]).sum(0)
        case.optimizer.zero_gradients()
        case.parts.engine.run_window(case.model, case.parts.objective, window, units, len(window.batches))
        found.append(torch.cat([gradient.clone() for gradient in case.optimizer.gradients()]))
    assert found[0].any()
    for cut in found[1:]:
        torch.testing.assert_close(cut, found[0], rtol=1e-4, atol=1e-6)
