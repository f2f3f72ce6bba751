"""DreamBooth from recipe to files: against diffusers' script by hand, resumed, in micro-batches, drawn and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.image_case import ATTENTION, CLASS_PROMPT, OF_TEXT, ByHand, records, write_image_recipe, write_photos
from tests.tiny_pipelines import saved_pipeline
from tunekit.train import train_verb

STEPS = 20


def trained(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> Path:
    train_verb(str(recipe), [f"output.dir={run}", *overrides], resume, False)
    return run


def with_prior(folder: Path, weight: float = 0.7) -> dict[str, Any]:
    """Settings of prior preservation, with three pictures of the class."""
    classes = write_photos(folder / "classes", 3, seed=9)
    return {
        "class_prompt": CLASS_PROMPT,
        "class_data_dir": str(classes),
        "num_class_images": 3,
        "prior_loss_weight": weight,
    }


def adapter_tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("prediction", "prior", "text"),
    [("epsilon", False, False), ("v_prediction", True, False), ("epsilon", True, True), ("v_prediction", False, True)],
)
def test_20_steps_equal_diffusers_script_by_hand(
    tmp_path: Path, shared: Path, prediction: str, prior: bool, text: bool
) -> None:
    photos = shared / "data" / "dreambooth_dog" / "instance"
    pipeline = saved_pipeline(tmp_path / "sd", "sd", prediction)
    objective = {"train_text_encoder": text, **(with_prior(tmp_path) if prior else {})}
    adapter = {"target_modules": [*ATTENTION, *OF_TEXT]} if text else {}
    training = {"max_steps": STEPS}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective, adapter=adapter, training=training)
    hand = ByHand(recipe, photos)
    windows = hand.prepared.rows.windows(hand.prepared.batch_settings)
    losses, norms = zip(*map(hand.step, windows.windows(0)), strict=True)
    run = trained(recipe, tmp_path / "run")
    ours = records(run)
    assert [record["loss"] for record in ours] == pytest.approx(losses, abs=1e-5)
    assert [record["grad_norm"] for record in ours] == pytest.approx(norms, rel=1e-3)
    assert len(losses) == STEPS
    found = adapter_tensors(run)
    assert any(name.startswith("base_model.model.text_encoder.") for name in found) == text
    for name, parameter in hand.parameters.items():
        assert torch.allclose(found[f"base_model.model.{name}"], parameter.detach(), atol=2e-4), name
