"""Limits the tokens of an image, by the setting that each image processor has for it. Settings are found by running the
processor on sizes, so that no family needs code of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunekit.errors import RecipeError
from tunekit.files.durable import write_json
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from transformers import ProcessorMixin

KEY = "data.image_tokens"
SOFT_TOKENS = (70, 140, 280, 560, 1120)  # the values of max_soft_tokens that image processors accept
# Heights and widths of images for which processors write the largest number of tokens: the area decides or, for tiles,
# the ratio of the sides. One patch on the shorter side is more than its share of the area: such images are left out.
LARGEST = [(4800 // high, 4800 // wide) for high in range(1, 41) for wide in range(1, 41) if min(high, wide) == 1]
USUAL = [size for size in LARGEST if max(size) <= 4 * min(size)]
SMALL = (64, 64)  # height and width of an image that is quickly processed
COUNT = "_get_num_multimodal_tokens"  # transformers' method that counts tokens of images by their sizes
PINPOINTS = "image_grid_pinpoints"
PATCHES = "merge_size"  # a setting of image processors that write one token for a square of patches
MANY = 4096  # a number of tokens at which rounding changes little
LARGER = 32  # a number of tiles, patches or tokens at which every setting changes the number of tokens
FILES = ("preprocessor_config.json", "processor_config.json")
NESTED = "image_processor"  # the key of processor_config.json with the image processor's settings


def most_tokens(native: ProcessorMixin, sizes: Sequence[tuple[int, int]] = USUAL) -> int:
    """The maximum number of tokens that the processor writes for an image, with the marks around them, among images of
    these heights and widths. The processor counts the features of each size. If it writes marks too, it is run on the
    size with the most features.

    Raises: RecipeError if the processor does not count them.
    """
    if not hasattr(native, COUNT):
        what = f"{type(native).__name__} cannot limit the tokens of an image"
        raise RecipeError(what, "write auto, and make large images smaller", key=KEY)
    counts = _feature_counts(native, sizes)
    if written_tokens(native, *SMALL) == _feature_counts(native, [SMALL])[0]:
        return max(counts)
    return max(max(counts), written_tokens(native, *sizes[counts.index(max(counts))]))


def _feature_counts(native: ProcessorMixin, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """The number of features of an image of each size. Before transformers 5.25, some types also count marks."""
    return list(map(int, getattr(native, COUNT)(image_sizes=sizes)["num_image_tokens"]))


def written_tokens(native: ProcessorMixin, height: int, width: int) -> int:
    """The number of tokens that the processor writes for an image of this size."""
    image, placeholder = np.zeros((height, width, 3), np.uint8), str(native.image_token)
    output = native(images=[[image]], text=[placeholder], padding=False, return_text_replacement_offsets=True)
    [[replacement, *_]] = output["text_replacement_offsets"]
    return len(native.tokenizer(str(replacement["replacement"]), add_special_tokens=False)["input_ids"])


def limit_tokens(native: ProcessorMixin, tokens: int) -> JsonObject:
    """Change the image processor so that it writes at most `tokens` tokens for an image, and as many as it can. Returns
    the changed settings: none if every image has the same number of tokens, and it is not above the limit.

    Raises: RecipeError if the processor writes more tokens with every setting.
    """
    unlimited = native.image_processor.to_dict()
    changed = _lower_size(native, unlimited, tokens)
    _apply(native, unlimited, changed)
    return changed


def _lower_size(native: ProcessorMixin, unlimited: JsonObject, tokens: int) -> JsonObject:
    """The settings with the largest size within the limit. Features are counted first, and marks at the end, because
    counting marks takes a run of the processor."""
    sizes = USUAL if PATCHES in unlimited else LARGEST

    def most(number: int) -> int:
        _apply(native, unlimited, _settings(unlimited, number))
        return max(_feature_counts(native, sizes))

    def written(number: int) -> int:
        _apply(native, unlimited, _settings(unlimited, number))
        return most_tokens(native, sizes)

    # the base's own configuration has the same pinpoints, and both must be equal
    if unlimited.get(PINPOINTS) or not _settings(unlimited, 1) or (smallest := most(1)) == most(LARGER):
        return _fixed(native, unlimited, tokens)
    if smallest > tokens:
        raise _too_few(tokens, written(1))
    low, high = 1, 2
    while high <= 4 * tokens and most(high) <= tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if most(middle) <= tokens else (low, middle)
    if PATCHES in unlimited:  # sides that need no rounding reach the number of pixels, which some types count per frame
        low = min(low, tokens * round(MANY / most(MANY)))
    while (count := written(low)) > tokens:
        if low == 1:
            raise _too_few(tokens, count)
        low = min(low - 1, max(low * tokens // count, 1))
    return _settings(unlimited, low)


def _settings(unlimited: JsonObject, number: int) -> dict[str, Any]:
    """The settings of an image processor for a size, which grows with `number`; empty if it has no such settings."""
    size = {name: value for name, value in (unlimited.get("size") or {}).items() if value is not None}
    if "max_soft_tokens" in unlimited:
        return {"max_soft_tokens": SOFT_TOKENS[min(number, len(SOFT_TOKENS)) - 1]}
    if PATCHES in unlimited and "longest_edge" in size:  # the edges are numbers of pixels
        pixels = number * (unlimited["patch_size"] * unlimited[PATCHES]) ** 2
        return {"size": {**size, "shortest_edge": min(size["shortest_edge"], pixels), "longest_edge": pixels}}
    if [*size] == ["longest_edge"]:
        step = (unlimited.get("max_image_size") or {}).get("longest_edge") or unlimited["patch_size"]["height"]
        return {"size": {"longest_edge": number * step}}
    if "max_patches" in unlimited:
        fewest = unlimited.get("min_patches")
        return {"max_patches": number, **({} if fewest is None else {"min_patches": min(fewest, number)})}
    return {}


def _apply(native: ProcessorMixin, unlimited: JsonObject, changed: Mapping[str, object]) -> None:
    """Give the processor an image processor with changed settings."""
    native.image_processor = type(native.image_processor).from_dict({**unlimited, **changed})


def _fixed(native: ProcessorMixin, unlimited: JsonObject, tokens: int) -> JsonObject:
    """No settings. Raises: RecipeError if the number of tokens of each image is above the limit."""
    _apply(native, unlimited, {})
    if (count := most_tokens(native)) > tokens:
        raise _too_few(tokens, count)
    return {}


def _too_few(tokens: int, fewest: int) -> RecipeError:
    what = f"{tokens:,} is too small: the lowest limit that this base's processor can keep is {fewest:,} tokens"
    return RecipeError(what, f"write {fewest} or more, or auto", key=KEY)


def limit_text(most: int | None, changed: JsonObject) -> str:
    """The maximum number of tokens of an image, and the changed settings that limit it."""
    if most is None:
        return "the maximum number of tokens of an image is unknown"
    return f"an image takes at most {most:,} tokens" + (f" ({json.dumps(changed)[1:-1]})" if changed else "")


def write_settings(folder: Path, changed: Mapping[str, object]) -> None:
    """Write changed settings into the image processor's files of a model folder."""
    for path in (folder / name for name in FILES):
        values = json.loads(path.read_bytes()) if path.is_file() else {}
        nested = path.name == FILES[1]
        settings = values.get(NESTED) if nested else values
        if not settings:
            continue
        settings = {**settings, **changed}
        size = settings.get("size") or {}
        for older, name in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if older in settings and name in size:
                settings[older] = size[name]
        write_json(path, {**values, NESTED: settings} if nested else settings)
