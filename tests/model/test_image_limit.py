"""The limit of an image's tokens, mapped to the setting of each processor of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from transformers import PreTrainedTokenizerFast

from tests.conftest import write_tiny_llama
from tests.support.image_text_case import TILE_TOKENS, VISION_TOKENS
from tunekit.errors import RecipeError
from tunekit.model.images.limit import LARGEST, SOFT_TOKENS, USUAL, limit_tokens, most_tokens, write_settings

GEMMA = {"boi_token": "<b>", "eoi_token": "<e>", "image_token": "<i>"}
HEARING = {"audio_token": "<a>", "boa_token": "<ba>", "eoa_token": "<ea>"}
INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<c>", "video_token": "<v>"}
GLM = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|video|>")
SQUARE = {"height": 336, "width": 336}
ONE_TOKEN = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
MAKERS: dict[str, Callable[[Any], Any]] = {
    "qwen2_5_vl": lambda tok: hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 12_845_056}),
        tok(*VISION_TOKENS),
        hf.Qwen2VLVideoProcessor(),
    ),
    "qwen3_vl": lambda tok: hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(patch_size=16), tok(*VISION_TOKENS), hf.Qwen3VLVideoProcessor()
    ),
    "glm4v": lambda tok: hf.Glm4vProcessor(hf.Glm4vImageProcessor(), tok(*GLM), hf.Glm4vVideoProcessor()),
    "idefics3": lambda tok: hf.Idefics3Processor(hf.Idefics3ImageProcessor(), tok(*TILE_TOKENS), image_seq_len=169),
    "mistral3": lambda tok: hf.PixtralProcessor(
        hf.PixtralImageProcessor(), tok("[IMG]", "[IMG_BREAK]", "[IMG_END]"), patch_size=14, spatial_merge_size=2
    ),
    "gemma4": lambda tok: hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(), hf.Gemma4ImageProcessor(), tok(**GEMMA, **HEARING), hf.Gemma4VideoProcessor()
    ),
    "internvl": lambda tok: hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size={"height": 448, "width": 448}, crop_to_patches=True),
        tok(**INTERN),
        hf.InternVLVideoProcessor(),
    ),
    "llava_next": lambda tok: hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size=SQUARE), tok("<image>"), **ONE_TOKEN
    ),
    "llava": lambda tok: hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=SQUARE), tok("<image>"), **ONE_TOKEN
    ),
    "gemma3": lambda tok: hf.Gemma3Processor(hf.Gemma3ImageProcessor(), tok(**GEMMA), image_seq_length=256),
}
# limit -> the changed settings; None: refused
EXPECTED: dict[str, dict[int, dict[str, Any] | None]] = {
    "qwen2_5_vl": {
        256: {"size": {"shortest_edge": 3136, "longest_edge": 256 * 28 * 28}},
        4: {"size": {"shortest_edge": 3136, "longest_edge": 3136}},
    },
    "qwen3_vl": {256: {"size": {"shortest_edge": 3136, "longest_edge": 256 * 32 * 32}}},
    "glm4v": {256: {"size": {"shortest_edge": 12544, "longest_edge": 256 * 28 * 28 * 2}}},  # two frames of an image
    "idefics3": {900: {"size": {"longest_edge": 728}}, 100: None},
    "mistral3": {300: {"size": {"longest_edge": 448}}},
    "gemma4": {300: {"max_soft_tokens": 280}, 2000: {"max_soft_tokens": 1120}, 60: None},
    "internvl": {1280: {"max_patches": 3, "min_patches": 1}, 100: None},
    "llava_next": {3000: {}, 1900: None},
    "llava": {576: {}, 575: None},
    "gemma3": {262: {}, 261: None},  # 256 features, two marks and four line ends
}


FLAT = ("qwen2_5_vl", "qwen3_vl", "glm4v")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_llama(folder)

    def with_tokens(*added: str, **named: str) -> PreTrainedTokenizerFast:
        read = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=named)
        read.add_special_tokens({"additional_special_tokens": [*added, *named.values()]})
        return read

    return with_tokens


@pytest.mark.parametrize("kind", MAKERS)
def test_each_processor_has_its_own_setting(kind: str, tokenizer: Any) -> None:
    for tokens, settings in EXPECTED[kind].items():
        native = MAKERS[kind](tokenizer)
        if settings is None:
            with pytest.raises(RecipeError, match=rf"data\.image_tokens: {tokens:,} is too small: the lowest limit"):
                limit_tokens(native, tokens)
            continue
        assert limit_tokens(native, tokens) == settings
        assert most_tokens(native, USUAL if kind in FLAT else LARGEST) <= tokens
        sizes = [tuple(map(int, size)) for size in np.random.default_rng(0).integers(900, 3000, (200, 2))]
        sizes += [(28 * rows, 28 * columns) for rows in (8, 16, 32) for columns in (8, 16, 32)]
        assert most_tokens(native, sizes) <= tokens


def test_the_soft_tokens_are_those_of_transformers() -> None:
    from transformers.models.gemma4.image_processing_gemma4 import _SUPPORTED_SOFT_TOKENS

    assert tuple(_SUPPORTED_SOFT_TOKENS) == SOFT_TOKENS


def test_both_forms_of_files_get_the_limit(tmp_path: Path) -> None:
    """Older folders name pixels, which would undo the limit."""
    older, newer = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    older.write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14}))
    newer.write_text(json.dumps({"image_processor": {"size": {"longest_edge": 1}}, "processor_class": "A"}))
    size = {"shortest_edge": 2000, "longest_edge": 2000}
    write_settings(tmp_path, {"size": size})
    assert json.loads(older.read_text()) == {"min_pixels": 2000, "max_pixels": 2000, "patch_size": 14, "size": size}
    assert json.loads(newer.read_text()) == {"image_processor": {"size": size}, "processor_class": "A"}
