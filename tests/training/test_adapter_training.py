"""Every method of the LoRA family through the real loop: four steps on a tiny llama, and a resume in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.loop_case import check_four_steps, make_case, make_rows
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


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES)
def test_four_steps(tiny_llama: Path, case: str) -> None:
    method, own = CASES[case]
    check_four_steps(tiny_llama, settings_class("adapters", method)(**{"r": 4, "alpha": 8.0, **own}))


def test_a_penalty_counts_once_per_step_however_it_is_cut(tiny_llama: Path) -> None:
    found = []
    for size, accumulation, streaming in ((8, 1, None), (2, 4, None), (2, 4, {"pass_size": 2})):
        section = TrainingSection(micro_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1)
        adapter = AdaloraSettings(init_r=4, target_r=2, target_modules=("q_proj",))
        case = make_case(tiny_llama, make_rows(8), training=section, adapter=adapter, streaming=streaming)
        step = next(case.steps.after(0))
        units = torch.stack([case.parts.objective.loss.units(batch) for batch in step.batches]).sum(0)
        case.optimizer.zero_gradients()
        case.step(step, units, micro_batches=len(step.batches))
        found.append(torch.cat([gradient.clone() for gradient in case.optimizer.gradients()]))
    assert found[0].any()
    for cut in found[1:]:
        torch.testing.assert_close(cut, found[0], rtol=1e-4, atol=1e-6)
