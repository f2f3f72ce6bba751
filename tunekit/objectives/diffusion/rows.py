"""Rows of pictures for diffusion objectives: pictures with prompts go in; pixels of the trained size come out.

A row keeps its picture whole, as small as it can be to cover what is trained on, so that another part of it can be seen
in each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunekit.contracts import Row
from tunekit.data.encoding.images import Pixels, covering, read_image
from tunekit.errors import DataError
from tunekit.formats.image import ImageExample
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.objectives.diffusion.buckets import Size, nearest_bucket


class PictureEncoder:
    """A row is a picture that covers its bucket, its size before, the bucket's, and its prompt as UTF-8."""

    def __init__(self, instance_prompt: str | None, buckets: Sequence[Size], processor: PipelineProcessor) -> None:
        self.instance_prompt, self.buckets, self.processor = instance_prompt, buckets, processor
        self.notices: Counter[str] = Counter()

    def examples(self, example: Any) -> Sequence[Any]:
        """One row a picture."""
        return [example]

    def encode(self, example: ImageExample, origin: str) -> Row:
        """The row. Raises: Dropped for an animated or tiny picture; DataError for one that cannot be read."""
        prompt = example.text or self.instance_prompt
        if not prompt:
            raise DataError("the image has no 'text'", "write one, or objective.instance_prompt for all")
        found = Counter[str]()
        image = example.image
        pixels = read_image(image.path if image.data is None else image.data, found)
        self.notices.update(+found)
        for cut in self.processor.cut_prompts([prompt]):
            self.notices[f"has a prompt of which CLIP does not see the end ({cut[:40]}...)"] += 1
        size = nearest_bucket(pixels.shape[:2], self.buckets)
        if len(self.buckets) > 1:
            self.notices[f"trained on at {size[1]} x {size[0]} pixels"] += 1
        return make_row(covering(pixels, size), pixels.shape[:2], prompt, size, origin)

    def prompt(self, example: ImageExample) -> None:
        """None: nothing answers."""

    def question(self, text: str) -> str:
        """The prompt itself."""
        return text

    def shown(self, asked: str) -> str:
        """The prompt itself."""
        return asked


def make_row(pixels: Pixels, original: Sequence[int], prompt: str, size: Size, origin: str, number: int = 0) -> Row:
    """A row of a picture (H, W, 3) that had another size before, of which a part of `size` is seen; the loss counts one
    picture."""
    parts: dict[str, Any] = {
        "pixels": pixels.reshape(-1),
        "shape": np.array(pixels.shape[:2], np.int32),
        "original": np.array(original, np.int32),
        "bucket": np.array(size, np.int32),
        "prompt": np.frombuffer(prompt.encode(), np.uint8),
    }
    return Row(parts, (size[0] * size[1],), 1, origin, number)


def pixels_of(row: Row) -> Pixels:
    """(H, W, 3)."""
    pixels: Pixels = row.parts["pixels"].reshape(*row.parts["shape"], 3)
    return pixels


def bucket_of(row: Row) -> Size:
    """Height and width of what is seen of a picture."""
    height, width = row.parts["bucket"].tolist()
    return height, width


def prompt_of(row: Row) -> str:
    """What the picture shows."""
    return row.parts["prompt"].tobytes().decode()
