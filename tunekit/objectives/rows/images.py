"""Rows of images with labels. Random augmentation depends only on (seed, step, row)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch

from tunekit.contracts import (
    Array,
    Batch,
    EncodeOptions,
    Labels,
    Model,
    Pixels,
    Row,
    RowKind,
    RowLayout,
    RowParts,
    Span,
)
from tunekit.data.encoding.augmentation import Augmentation
from tunekit.data.encoding.images import Size, covering, read_image
from tunekit.formats.image_label import ImageLabelExample
from tunekit.formats.media import Media
from tunekit.model.call import seed_for
from tunekit.model.families.image_classifier import PixelProcessor
from tunekit.objectives.rows.labels import label_of, utf8
from tunekit.recipe.objectives.image_classify import ImageClassifySettings

NO_PIXELS: Pixels = np.zeros((0, 0, 3), np.uint8)
LARGEST = 2  # before random crops, images are reduced to at most this multiple of the trained size


class ImagePrompt(NamedTuple):
    """An image (side, side, 3) in the form that the model's image processor returns, and its original height and
    width."""

    seen: Pixels
    original: Size


@dataclass(frozen=True, eq=False)
class LabelledImages(RowKind):
    """Rows of images with labels. Parts: `seen`, the image in the form that the model's image processor returns;
    `original`, the image's size in the file; `label` as UTF-8. For random crops also `pixels`, the image to crop, and
    `shape`, the shape of `pixels`."""

    example = "image_label"
    layout = RowLayout(
        {"pixels": "u1", "shape": "<i4", "original": "<i4", "seen": "u1", "label": "u1"},
        (),
        sizes=1,
        token_sizes=(),
        identity=("pixels", "seen", "label"),
    )

    settings: ImageClassifySettings
    processor: PixelProcessor
    fingerprint: str
    options: EncodeOptions
    labels: Labels
    notices: Counter[str] = field(default_factory=Counter)
    draws: bool = True

    @cached_property
    def augmentation(self) -> Augmentation:
        """The random transforms that each step applies."""
        settings = self.settings
        scale = (settings.crop_scale[0], settings.crop_scale[1]) if settings.random_resized_crop else None
        return Augmentation(
            self.processor.resolution,
            scale,
            settings.random_flip,
            settings.randaugment_ops,
            settings.randaugment_magnitude,
            settings.random_erasing,
        )

    def encode(self, example: ImageLabelExample, origin: str) -> Row:
        """The row of an example. Raises: Dropped for an animated or tiny image; DataError for an unreadable image or
        an unlisted label."""
        label = self.labels.read(example.label)
        pixels = read_pixels(example.image, self.notices)
        return self.make_row(_parts(self._prompt(pixels), label, self.uncropped(pixels)), origin)

    def uncropped(self, pixels: Pixels) -> Pixels:
        """The pixels from which random crops are made; empty if the recipe has no random crops."""
        if not self.settings.random_resized_crop:
            return NO_PIXELS
        resolution = self.processor.resolution
        side = min(max(min(pixels.shape[:2]), resolution), resolution * LARGEST)
        return covering(pixels, (side, side))

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        return (len(parts["seen"]) // 3,)

    def prompt(self, example: ImageLabelExample) -> tuple[ImagePrompt, str]:
        """The image, and its label."""
        prompt = self._prompt(read_pixels(example.image, self.notices))
        return prompt, self.labels.written(self.labels.read(example.label))

    def question(self, text: str) -> ImagePrompt:
        """The image at this path."""
        return self._prompt(read_pixels(Media(text), self.notices))

    def readable(self, prompt: ImagePrompt) -> str:
        """The size of the image."""
        return f"an image of {prompt.original[1]} x {prompt.original[0]} pixels"

    def unlabelled(self, model: Model, prompts: Sequence[ImagePrompt]) -> list[Row]:
        """Rows of images whose labels are not known."""
        return [self.make_row(_parts(prompt, self.labels.placeholder), "") for prompt in prompts]

    def _prompt(self, pixels: Pixels) -> ImagePrompt:
        return ImagePrompt(self.processor.visible_pixels(pixels), (pixels.shape[0], pixels.shape[1]))

    def draw(self, row: Row, key: tuple[int, ...]) -> Row:
        """The row with the part `view` added: the image after this step's random augmentation."""
        pixels = row.parts["pixels"].reshape(*row.parts["shape"], 3) if row.parts["pixels"].size else self._seen(row)
        view = self.augmentation.changed(pixels, seed_for("augmentation", *key))
        return replace(row, parts={"view": view, "label": row.parts["label"]})

    def evaluation_copy(self) -> Self:
        """A copy of the rows for evaluation, without augmentation."""
        return replace(self, draws=False)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. Its images are the rows' parts `view`, or `seen` if a row was not augmented.
        Shapes: pixel_values (R, 3, side, side) float32; labels (R, ...)."""
        rows = [row for sequence in sequences for row in sequence]
        views = np.stack([row.parts["view"] if "view" in row.parts else self._seen(row) for row in rows])
        scale, offset = self.processor.scale
        values = torch.from_numpy(views).float() @ scale.T + offset  # (R, side, side, C)
        inputs = {"pixel_values": values.permute(0, 3, 1, 2).contiguous()}
        targets = {"labels": self.labels.targets(map(label_of, rows))}
        return Batch(inputs, targets, tuple(map(tuple, sequences)), self.processor.resolution**2)

    def _seen(self, row: Row) -> Pixels:
        return row.parts["seen"].reshape(self.processor.resolution, self.processor.resolution, 3)

    def spans(self, row: Row) -> list[Span]:
        """The label, the image's original size, and the image before augmentation, for preview."""
        height, width = row.parts["original"].tolist()
        title = f"label: {label_of(row)} ({width} x {height} pixels)"
        return [Span(title=title, image=self._seen(row))]


def read_pixels(image: Media, notices: Counter[str]) -> Pixels:
    """Read the pixels of an image. `notices` counts images that had to be converted."""
    counts = Counter[str]()
    pixels = read_image(image.path if image.data is None else image.data, counts)
    notices.update(+counts)
    return pixels


def _parts(prompt: ImagePrompt, label: str, pixels: Pixels = NO_PIXELS) -> dict[str, Array]:
    return {
        "pixels": pixels.reshape(-1),
        "shape": np.array(pixels.shape[:2], np.int32),
        "original": np.array(prompt.original, np.int32),
        "seen": prompt.seen.reshape(-1),
        "label": utf8(label),
    }
