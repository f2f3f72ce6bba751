"""What a model's own processor makes of a picture's numbers, against that processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EfficientNetImageProcessor, MobileViTImageProcessor, ViTImageProcessor

from tunekit.errors import ModelError
from tunekit.model.families.image_classifier import PixelProcessor

SIDE = 24
SQUARE = {"height": SIDE, "width": SIDE}
PROCESSORS = {
    "mean and deviation": ViTImageProcessor(size=SQUARE, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.25, 0.2]),
    "not normalised": ViTImageProcessor(size=SQUARE, do_normalize=False),
    "not rescaled": ViTImageProcessor(size=SQUARE, do_rescale=False, do_normalize=False),
    "blue first": MobileViTImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    "divided twice": EfficientNetImageProcessor(size=SQUARE),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_numbers_are_those_of_the_models_own_processor(tmp_path: Path, case: str) -> None:
    own: Any = PROCESSORS[case]
    own.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    expected = own(images=pixels, return_tensors="pt", do_resize=False)["pixel_values"][0]  # (3, SIDE, SIDE)
    scale, offset = PixelProcessor(tmp_path).scale
    found = (torch.from_numpy(pixels).float() @ scale.T + offset).permute(2, 0, 1)
    assert torch.allclose(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_another_size_is_written_beside_the_result(tmp_path: Path) -> None:
    ViTImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(tmp_path)
    (tmp_path / "merged").mkdir()
    PixelProcessor(tmp_path, side=48).save(tmp_path / "merged")
    saved = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert (saved["size"], saved["crop_size"]) == ({"shortest_edge": 64}, {"height": 48, "width": 48})
    assert PixelProcessor(tmp_path / "merged").resolution == 48


def test_a_size_that_is_no_square_is_refused(tmp_path: Path) -> None:
    ViTImageProcessor(size={"height": 24, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="32 x 24 pixels, and only squares"):
        _ = PixelProcessor(tmp_path).resolution
