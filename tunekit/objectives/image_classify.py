"""Image classification: cross entropy on one label for each picture.

Comes in: pictures with labels, then a Batch and the model's scores.  Goes out: rows, then Loss (sum over pictures).
How a picture is changed is drawn from (seed, step, row).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

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
from tunekit.data.encoding.images import Pixels, cropped, read_image, resized
from tunekit.formats.image_label import ImageLabelExample
from tunekit.model.call import seed_for
from tunekit.model.families.image_classifier import PixelProcessor
from tunekit.model.placing import placed
from tunekit.objectives.labelled import LabelObjective, make_objective_of, refuse_sampling
from tunekit.recipe.objectives.image_classify import ImageClassifySettings

KEPT = 2  # how many times as large as it is trained on a picture is kept, where parts of it are


class ImageEncoder:
    """A row is a picture, no larger than can be of use, and its label as UTF-8."""

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
        return make_row(pixels, np.frombuffer(example.label.encode(), np.uint8), self.objective.resolution, origin)

    def _pixels(self, source: str | bytes) -> Pixels:
        found = Counter[str]()
        pixels = read_image(source, found)
        self.notices.update(+found)
        return resized(pixels, self.objective.kept_side(min(pixels.shape[:2])))

    def prompt(self, example: ImageLabelExample) -> tuple[Pixels, str]:
        """The picture, and its label."""
        return self._pixels(example.image.path if example.image.data is None else example.image.data), example.label

    def question(self, text: str) -> Pixels:
        """The picture of this path."""
        return self._pixels(text)

    def shown(self, asked: Pixels) -> str:
        """Its size."""
        return f"a picture of {asked.shape[1]} x {asked.shape[0]} pixels"


def make_row(pixels: Pixels, label: np.ndarray[Any, Any], side: int, origin: str, number: int = 0) -> Row:
    """A row of a picture (H, W, 3), of which side x side pixels are seen, and a label."""
    parts: dict[str, Any] = {
        "pixels": pixels.reshape(-1),
        "shape": np.array(pixels.shape[:2], np.int32),
        "label": label,
    }
    return Row(parts, (side * side,), 1, origin, number)


class ImageClassify(LabelObjective):
    """loss = sum over rows of -log p(label | picture); divided by the step's number of rows."""

    metrics: Sequence[str] = ("loss", "accuracy", "macro_f1")
    measures = False  # whether rows are only measured: their middle, as it is
    layout = RowLayout(
        {"pixels": "u1", "shape": "<i4", "label": "u1"}, (), sizes=1, token_sizes=(), told_by=("pixels", "label")
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

    def kept_side(self, shorter: int) -> int:
        """Pixels of the shorter side that a row keeps of a picture of this one."""
        return min(max(shorter, self.resolution), self.resolution * (KEPT if self.settings.random_resized_crop else 1))

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
                view = self.augmentation.changed(pixels_of(row), seed)
                rows.append(replace(row, parts={"view": view, "label": row.parts["label"]}))
            batches.append(self.collate([[row] for row in rows]))
        return replace(window, batches=tuple(batches))

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Shapes: pixel_values (R, 3, side, side) float32; labels (R,). Without a step's change the middle is seen."""
        rows = [row for sequence in sequences for row in sequence]
        views = np.stack([row.parts["view"] if "view" in row.parts else self._middle(row) for row in rows])
        scale, offset = self.processor.scale
        values = torch.from_numpy(views).float() @ scale.T + offset  # (R, side, side, C)
        inputs = {"pixel_values": values.permute(0, 3, 1, 2).contiguous()}
        return Batch(inputs, {"labels": self.numbers(sequences)}, tuple(map(tuple, sequences)), self.resolution**2)

    def _middle(self, row: Row) -> Pixels:
        return cropped(resized(pixels_of(row), self.resolution), self.resolution)[0]

    def scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        assert output.logits is not None
        return output.logits.float(), placed(batch.targets["labels"], output.logits.device)

    def spans(self, row: Row) -> list[Part]:
        """The label and the picture's size."""
        (height, width), empty = row.parts["shape"].tolist(), np.zeros(0, np.int64)
        title = f"label: {self.labels_of(row)[0]} ({width} x {height} pixels)"
        return [Part(empty, np.zeros(0, np.bool_), title=title)]

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
        found: list[str] = held.most_likely(
            model, [make_row(pixels, first, self.resolution, "") for pixels in prompts], batch_size
        )
        return found


def pixels_of(row: Row) -> Pixels:
    """(H, W, 3)."""
    pixels: Pixels = row.parts["pixels"].reshape(*row.parts["shape"], 3)
    return pixels


def make(settings: ImageClassifySettings, processor: PixelProcessor, facts: Mapping[str, Any]) -> ImageClassify:
    """The objective of `objective: image_classify`; facts are what an adapter's folder says of it."""
    settings = settings.model_copy(update={key: facts[key] for key in ("resolution",) if key in facts})
    return make_objective_of(ImageClassify, settings, processor, facts)
