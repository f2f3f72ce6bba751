"""Plans of published pipelines from their configurations alone, and of a tiny one against what its run takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.image_case import ATTENTION, write_image_recipe, write_photos
from tests.support.plans import make_plan
from tests.support.published_pipelines import UNET_PARAMETERS, written_pipeline
from tunekit.model.load import make_meta_model
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.records import Plan

GPU, CPU = torch.device("cuda"), torch.device("cpu")
GB = 1e9
VAE_PARAMETERS = 83_653_863


def planned(folder: Path, name: str, device: torch.device = GPU, **sections: dict[str, Any]) -> Plan:
    place = folder / name
    pipeline = place if place.exists() else written_pipeline(place, name)
    photos = write_photos(folder / "photos", 2)
    values: dict[str, dict[str, Any]] = {
        "model": {"dtype": "float32"},
        "data": {"eval": None},
        "objective": {"resolution": None},
        "training": {"micro_batch_size": 1},
        "adapter": {"r": 16, "alpha": 16, "target_modules": ATTENTION},
    }
    merged = {key: values.get(key, {}) | sections.get(key, {}) for key in {*values, *sections}}
    recipe = write_image_recipe(folder / "recipe", pipeline, photos, **merged)
    return make_plan(load_recipe(str(recipe), []), device=device)[0]


@pytest.mark.parametrize("name", UNET_PARAMETERS)
def test_published_configurations_have_the_published_parameters(tmp_path: Path, name: str) -> None:
    base = make_meta_model(ModelSection(name_or_path=str(written_pipeline(tmp_path / name, name))), device=CPU)
    net: Any = base.net
    assert sum(parameter.numel() for parameter in net.unet.parameters()) == UNET_PARAMETERS[name]


@pytest.mark.slow
def test_stable_diffusion_is_planned_with_and_without_checkpointing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("available_bytes", "total_bytes"):
        monkeypatch.setattr(f"tunekit.planning.prepared.{name}", lambda device: 80 * 2**30)
    whole, recomputed = (
        planned(tmp_path, "sd14", memory={"gradient_checkpointing": setting}).peak_bytes for setting in (False, True)
    )
    assert whole.weights == pytest.approx(4 * UNET_PARAMETERS["sd14"], rel=0.01), "the VAE and CLIP have left"
    with_vae = 4 * (UNET_PARAMETERS["sd14"] + VAE_PARAMETERS)
    assert recomputed.weights == pytest.approx(with_vae, rel=0.01), "its peak is where pictures are encoded"
    assert recomputed.total < whole.total - 0.5 * GB
    assert 1.2 * GB < whole.activations < 2.2 * GB
