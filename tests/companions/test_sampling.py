"""The memory that sampling takes in a run, beside the memory that plan states for it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.objectives.test_dpo import CPU
from tests.objectives.test_grpo import base as base
from tests.objectives.test_grpo import write_prompts
from tests.support.plans import make_plan
from tests.support.train_case import train
from tunekit.companions.sampling import SamplingMemory, cache_shapes
from tunekit.model.text.decoder import Decoder
from tunekit.recipe.load import load_recipe
from tunekit.records import bytes_text


@pytest.mark.drawn
@pytest.mark.parametrize("slots", [3, 5])
def test_keys_and_values_of_samples_fit_into_the_planned_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Those of the slots, which prompts of different lengths share, and of the prompts."""
    objective = {"num_generations": 3, "max_completion_length": 12, "sampling_batch_size": slots}
    training = {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2, "epochs": None}
    recipe = write_prompts(tmp_path, base, objective=objective, training=training)
    planned: list[int] = []
    rehearse, step, peaks = SamplingMemory.rehearse, Decoder.step, [(0, 0)]

    def noted(self: Any, run: Any, *others: Any) -> None:
        tokens = self.prompt_tokens + self.new_tokens
        numbers = 2 * sum(map(prod, cache_shapes(run.model.base, slots, tokens)))
        planned.append(numbers * run.model.base.dtype.itemsize)
        rehearse(self, run, *others)

    def measured(self: Any) -> Any:
        tokens, prefill = step(self), self._slot_batch._prefill
        peaks.append((self.nbytes, 0 if prefill is None else prefill.slots.nbytes))
        return tokens

    monkeypatch.setattr(SamplingMemory, "rehearse", noted)
    monkeypatch.setattr(Decoder, "step", measured)
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    assert any(f"tokens each, take {bytes_text(planned[0])}" in note for note in plan.notes)
    train(recipe)
    of_slots, of_all = max(size for size, _ in peaks), max(map(sum, peaks))
    assert 0.8 * planned[0] < of_slots <= planned[0]
    assert of_all <= plan.peak_bytes.activations
