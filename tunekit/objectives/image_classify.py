"""Image classification: cross entropy on one label for each picture.

Comes in: pictures with labels, then a Batch and the model's scores.  Goes out: rows, then Loss (sum over pictures).
How a picture is changed is drawn from (seed, step, row).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import (
    GREEDY,
    Batch,
    Gather,
    ModelOutput,
    Objective,
    Part,
    Row,
    RowLayout,
    Rows,
    Sampling,
    Window,
)
from tunekit.data.encoding.augmentation import Augmentation
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.images import Pixels, Size, covering, read_image
from tunekit.formats.image_label import ImageLabelExample
from tunekit.machine.placing import placed
from tunekit.model.call import seed_for
from tunekit.model.families.image_classifier import PixelProcessor
from tunekit.objectives.labelled import LabelObjective, make_objective_of, refuse_sampling
from tunekit.recipe.objectives.image_classify import ImageClassifySettings

NOTHING: Pixels = np.zeros((0, 0, 3), np.uint8)
KEPT = 2  # how many times as large as it is trained on a picture is kept, where parts of it are


class Asked(NamedTuple):
    """A picture (side, side, 3) as the model's own processor sees it, and its height and width before."""

    seen: Pixels
    original: Size


class ImageEncoder:
    """A row is a picture as the model's own processor sees it, its label as UTF-8, and, where parts of it are trained
    on, the whole picture, no larger than can be of use."""

    def __init__(self, objective: ImageClassify) -> None:
        self.objective = objective
        self.notices: Counter[str] = Counter()

    def examples(self, example: Any) -> Sequence[Any]:
        """One row a picture."""
        return [example]

    def encode(self, example: ImageLabelExample, origin: str) -> Row:
        """The row. Raises: Dropped for an animated or tiny picture; DataError for one that cannot be read, and for a
        label beyond those that were given."""
        self.objective.check_label(example.label)
        pixels = self._pixels(example.image.path if example.image.data is None else example.image.data)
        label = np.frombuffer(example.label.encode(), np.uint8)
        return make_row(self._asked(pixels), label, origin, whole=self.objective.kept(pixels))

    def _pixels(self, source: str | bytes) -> Pixels:
        found = Counter[str]()
        pixels = read_image(source, found)
        self.notices.update(+found)
        return pixels

    def _asked(self, pixels: Pixels) -> Asked:
        return Asked(self.objective.processor.seen(pixels), (pixels.shape[0], pixels.shape[1]))

    def prompt(self, example: ImageLabelExample) -> tuple[Asked, str]:
        """The picture, and its label."""
        pixels = self._pixels(example.image.path if example.image.data is None else example.image.data)
        return self._asked(pixels), example.label

    def question(self, text: str) -> Asked:
        """The picture of this path."""
        return self._asked(self._pixels(text))

    def shown(self, asked: Asked) -> str:
        """Its size."""
        return f"an image of {asked.original[1]} x {asked.original[0]} pixels"


def make_row(asked: Asked, label: np.ndarray[Any, Any], origin: str, number: int = 0, whole: Pixels = NOTHING) -> Row:
    """A row of a picture with a label. Shapes: whole (H, W, 3)."""
    parts: dict[str, Any] = {
        "pixels": whole.reshape(-1),
        "shape": np.array(whole.shape[:2], np.int32),
        "original": np.array(asked.original, np.int32),
        "seen": asked.seen.reshape(-1),
        "label": label,
    }
    return Row(parts, (asked.seen.shape[0] * asked.seen.shape[1],), 1, origin, number)


class ImageClassify(LabelObjective):
    """loss = sum over rows of -log p(label | picture); divided by the step's number of rows."""

    metrics: Sequence[str] = ("loss", "accuracy", "macro_f1")
    measures = False  # whether rows are only measured: as the model's own processor sees them
    layout = RowLayout(
        {"pixels": "u1", "shape": "<i4", "original": "<i4", "seen": "u1", "label": "u1"},
        (),
        sizes=1,
        token_sizes=(),
        told_by=("pixels", "seen", "label"),
    )
    settings: ImageClassifySettings
    processor: PixelProcessor

    def __init__(self, settings: ImageClassifySettings, processor: PixelProcessor, *given: Any) -> None:
        if settings.resolution is not None:
            processor = replace(processor, side=settings.resolution)
        super().__init__(settings, processor, *given)
        self.resolution = processor.resolution
        if settings.resolution is not None:
            self.facts = {**self.facts, "resolution": settings.resolution}
        self.augmentation = Augmentation(
            self.resolution,
            (settings.crop_scale[0], settings.crop_scale[1]) if settings.random_resized_crop else None,
            settings.random_flip,
            settings.randaugment_ops,
            settings.randaugment_magnitude,
            settings.random_erasing,
        )

    def kept(self, pixels: Pixels) -> Pixels:
        """What a row keeps of a picture for the parts of it that steps see; nothing where they see the whole."""
        if not self.settings.random_resized_crop:
            return NOTHING
        side = min(max(min(pixels.shape[:2]), self.resolution), self.resolution * KEPT)
        return covering(pixels, (side, side))

    def labels_of(self, row: Row) -> list[str]:
        return [row.parts["label"].tobytes().decode()]

    def row_encoder(self, options: EncodeOptions) -> ImageEncoder:
        """What encodes pictures."""
        return ImageEncoder(self)

    def held_out(self) -> Objective:
        """As rows are only measured."""
        found = copy(self)
        found.measures = True
        return found

    def measuring(self, model: object, rows: Rows, batches: Iterable[Batch], gather: Gather) -> Objective:
        """As rows are only measured: one by one."""
        return self.held_out()

    def prepare(self, model: object, window: Window, gather: Gather = list) -> Window:
        """Each picture as its step sees it."""
        if self.measures:
            return window
        seen, batches = Counter[int](), []
        for batch in window.batches:
            rows = []
            for row in batch.rows:
                seed = seed_for("augmentation", window.seed, window.step, row.number, seen[row.number])
                seen[row.number] += 1
                whole = pixels_of(row) if row.parts["pixels"].size else self._seen(row)
                view = self.augmentation.changed(whole, seed)
                rows.append(replace(row, parts={"view": view, "label": row.parts["label"]}))
            batches.append(self.collate([[row] for row in rows]))
        return replace(window, batches=tuple(batches))

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Shapes: pixel_values (R, 3, side, side) float32; labels (R,). Without a step's change, as the model's
        own processor sees pictures."""
        rows = [row for sequence in sequences for row in sequence]
        views = np.stack([row.parts["view"] if "view" in row.parts else self._seen(row) for row in rows])
        scale, offset = self.processor.scale
        values = torch.from_numpy(views).float() @ scale.T + offset  # (R, side, side, C)
        inputs = {"pixel_values": values.permute(0, 3, 1, 2).contiguous()}
        return Batch(inputs, {"labels": self.numbers(sequences)}, tuple(map(tuple, sequences)), self.resolution**2)

    def _seen(self, row: Row) -> Pixels:
        pixels: Pixels = row.parts["seen"].reshape(self.resolution, self.resolution, 3)
        return pixels

    def scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        assert output.logits is not None
        return output.logits.float(), placed(batch.targets["labels"], output.logits.device)

    def spans(self, row: Row) -> list[Part]:
        """The label, the picture's size and what evaluations see of it."""
        (height, width), empty = row.parts["original"].tolist(), np.zeros(0, np.int64)
        title = f"label: {self.labels_of(row)[0]} ({width} x {height} pixels)"
        return [Part(empty, np.zeros(0, np.bool_), title, self._seen(row))]

    def answer(
        self,
        model: Any,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int,
        batch_size: int,
        template: str | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The most likely label of each picture. Raises: InputError where one should be drawn."""
        refuse_sampling(sampling)
        first = np.frombuffer(self.labels[0].encode(), np.uint8)
        held: Any = self.held_out()
        found: list[str] = held.most_likely(model, [make_row(asked, first, "") for asked in prompts], batch_size)
        return found


def pixels_of(row: Row) -> Pixels:
    """(H, W, 3)."""
    pixels: Pixels = row.parts["pixels"].reshape(*row.parts["shape"], 3)
    return pixels


def make(settings: ImageClassifySettings, processor: PixelProcessor, facts: Mapping[str, Any]) -> ImageClassify:
    """The objective of `objective: image_classify`; facts are what an adapter's folder says of it."""
    settings = settings.model_copy(update={key: facts[key] for key in ("resolution",) if key in facts})
    return make_objective_of(ImageClassify, settings, processor, facts)
