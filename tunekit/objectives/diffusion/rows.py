"""Rows of pictures for diffusion objectives: pictures with prompts go in; pixels of the trained size come out.

A row keeps its picture whole, with its shorter side as large as what is trained on, so that another part of it can be
seen in each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunekit.contracts import Row
from tunekit.data.encoding.images import Pixels, read_image, resized
from tunekit.errors import DataError
from tunekit.formats.image import ImageExample
from tunekit.model.families.pipeline.processor import PipelineProcessor


class PictureEncoder:
    """A row is a picture whose shorter side has the resolution, its size before, and its prompt as UTF-8."""

    def __init__(self, instance_prompt: str | None, resolution: int, processor: PipelineProcessor) -> None:
        self.instance_prompt, self.resolution, self.processor = instance_prompt, resolution, processor
        self.notices: Counter[str] = Counter()

    def examples(self, example: Any) -> Sequence[Any]:
        """One row a picture."""
        return [example]

    def encode(self, example: ImageExample, origin: str) -> Row:
        """The row. Raises: Dropped for an animated or tiny picture; DataError for one that cannot be read."""
        prompt = example.text or self.instance_prompt
        if not prompt:
            raise DataError("the picture has no 'text'", "write one, or objective.instance_prompt for all")
        found = Counter[str]()
        image = example.image
        pixels = read_image(image.path if image.data is None else image.data, found)
        self.notices.update(+found)
        for cut in self.processor.cut_prompts([prompt]):
            self.notices[f"has a prompt of which CLIP does not see the end ({cut[:40]}...)"] += 1
        return make_row(resized(pixels, self.resolution), pixels.shape[:2], prompt, self.resolution, origin)

    def prompt(self, example: ImageExample) -> None:
        """None: nothing answers."""

    def question(self, text: str) -> str:
        """The prompt itself."""
        return text

    def shown(self, asked: str) -> str:
        """The prompt itself."""
        return asked


def make_row(pixels: Pixels, original: Sequence[int], prompt: str, side: int, origin: str, number: int = 0) -> Row:
    """A row of a picture (H, W, 3) that had another size before, of which side x side pixels are seen; the loss counts
    one picture."""
    parts: dict[str, Any] = {
        "pixels": pixels.reshape(-1),
        "shape": np.array(pixels.shape[:2], np.int32),
        "original": np.array(original, np.int32),
        "prompt": np.frombuffer(prompt.encode(), np.uint8),
    }
    return Row(parts, (side * side,), 1, origin, number)


def pixels_of(row: Row) -> Pixels:
    """(H, W, 3)."""
    pixels: Pixels = row.parts["pixels"].reshape(*row.parts["shape"], 3)
    return pixels


def prompt_of(row: Row) -> str:
    """What the picture shows."""
    return row.parts["prompt"].tobytes().decode()
