"""What a model's own processor sees of a picture and makes of its numbers, against that processor."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    PerceiverImageProcessor,
    PoolFormerImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    TextNetImageProcessor,
    ViTConfig,
    ViTImageProcessor,
)

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


EDGE = {"shortest_edge": SIDE}
GEOMETRIES = {
    "squashed": ViTImageProcessor(size=SQUARE),
    "squashed, nearest": ViTImageProcessor(size=SQUARE, resample=0),
    "squashed, bicubic": SiglipImageProcessor(size=SQUARE),
    "squashed, then cropped": DeiTImageProcessor(size={"height": 28, "width": 28}, crop_size=SQUARE),
    "shorter side, then cropped": CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
    "shorter side, cropped whole": BitImageProcessor(size=EDGE, crop_size=SQUARE),
    "a share cropped": ConvNextImageProcessor(size=EDGE, crop_pct=0.75),
    "squashed, as it is large": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "8 sevenths": LevitImageProcessor(size=EDGE, crop_size=SQUARE),
    "a share cropped, otherwise": PoolFormerImageProcessor(size=EDGE, crop_size=SQUARE, crop_pct=0.9),
    "blue first, cropped": MobileViTImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE),
    "cropped, then squashed": PerceiverImageProcessor(size=SQUARE, crop_size={"height": 32, "width": 32}),
    "squashed, divided twice": EfficientNetImageProcessor(size=SQUARE),
    "neither resized nor larger": ViTImageProcessor(do_resize=False, do_center_crop=True, crop_size=SQUARE),
}


@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("shape", [(37, 61), (90, 30), (24, 24), (13, 17)])
def test_what_is_seen_is_what_the_models_own_processor_sees(tmp_path: Path, case: str, shape: tuple[int, int]) -> None:
    GEOMETRIES[case].save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    own = AutoImageProcessor.from_pretrained(tmp_path)
    expected = own(images=pixels, return_tensors="pt")["pixel_values"][0].float()
    processor = PixelProcessor(tmp_path)
    scale, offset = processor.scale
    seen = processor.visible_pixels(pixels)
    assert seen.shape == (processor.resolution, processor.resolution, 3)
    found = (torch.from_numpy(seen).float() @ scale.T + offset).permute(2, 0, 1)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_processors_file_has_a_vision_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"image_size": 24}')
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    expected = ViTImageProcessor(size=SQUARE)(images=pixels, return_tensors="pt")["pixel_values"][0]
    processor = PixelProcessor(tmp_path)
    scale, offset = processor.scale
    found = (torch.from_numpy(processor.visible_pixels(pixels)).float() @ scale.T + offset).permute(2, 0, 1)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "merged").mkdir()
    processor.save(tmp_path / "merged")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "merged")
    assert torch.equal(theirs(images=pixels, return_tensors="pt")["pixel_values"][0], expected)


@pytest.mark.parametrize("case", ["squashed, then cropped", "shorter side, then cropped", "a share cropped"])
def test_another_size_has_the_same_geometry_when_it_is_saved(tmp_path: Path, case: str) -> None:
    GEOMETRIES[case].save_pretrained(tmp_path)
    processor = PixelProcessor(tmp_path, side=48)
    (tmp_path / "merged").mkdir()
    processor.save(tmp_path / "merged")
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 3)).astype(np.uint8)
    expected = AutoImageProcessor.from_pretrained(tmp_path / "merged")(images=pixels, return_tensors="pt")
    scale, offset = processor.scale
    assert processor.resolution == 48
    found = (torch.from_numpy(processor.visible_pixels(pixels)).float() @ scale.T + offset).permute(2, 0, 1)
    assert torch.allclose(found, expected["pixel_values"][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "own",
    [
        Siglip2ImageProcessor(),
        TextNetImageProcessor(size={"shortest_edge": 64}),
        CLIPImageProcessor(size=EDGE, do_center_crop=False),
    ],
)
def test_a_processor_without_one_square_an_image_is_refused_by_name(tmp_path: Path, own: Any) -> None:
    own.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{type(own).__name__} must return tensors \(3, H, W\) of one size"):
        _ = PixelProcessor(tmp_path).resolution


def test_a_size_that_no_image_has_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    ViTImageProcessor(size={"height": 10**9, "width": 10**9}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="size that is not between 1 and 4096 pixels"):
        _ = PixelProcessor(tmp_path).resolution


def test_another_size_is_written_beside_the_result(tmp_path: Path) -> None:
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(tmp_path)
    (tmp_path / "merged").mkdir()
    PixelProcessor(tmp_path, side=48).save(tmp_path / "merged")
    saved = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert (saved["size"], saved["crop_size"]) == ({"shortest_edge": 64}, {"height": 48, "width": 48})
    assert PixelProcessor(tmp_path / "merged").resolution == 48


def test_a_size_that_is_no_square_is_refused(tmp_path: Path) -> None:
    ViTImageProcessor(size={"height": 24, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="32 x 24 pixels, but training needs square images"):
        _ = PixelProcessor(tmp_path).resolution


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_an_absent_package_is_to_be_installed(tmp_path: Path) -> None:
    config = {"image_processor_type": "TimmWrapperImageProcessor", "architecture": "resnet18", "pretrained_cfg": {}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"TimmWrapperImageProcessor.*; install the package"):
        _ = PixelProcessor(tmp_path).processor
