"""Pictures of the class, by which a model keeps what it knew: those of a folder, and what it lacks drawn by the base.

Settings and a model go in; pixels come out.  Each drawn picture depends on its number alone, so that a run which was
interrupted draws the rest as it would have.  They are drawn as squares of the resolution, and seen in the bucket of the
picture beside which they are trained on, as in diffusers' train_dreambooth_lora_flux2.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tunekit.contracts import Told
from tunekit.data.encoding.images import Pixels, Size, covering, png_bytes, read_image
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.data_file import content_hash
from tunekit.data.reading.folder import passed_over
from tunekit.errors import DataError
from tunekit.files.cache_folder import hash_of
from tunekit.files.durable import write_bytes
from tunekit.model.call import calling, current_call, seed_for
from tunekit.model.families.pipeline.drawing import Drawing, draw_pictures
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.recipe.objectives.dreambooth import DreamboothSettings

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Sized = tuple[Pixels, Size]  # a picture and a size of it


class ClassImages:
    """The pictures of `class_data_dir`, read once for each size at which they are seen; of a model without values,
    blank ones."""

    def __init__(self, settings: DreamboothSettings, resolution: int) -> None:
        self.settings, self.resolution = settings, resolution
        self.paths: list[Path] = []
        self.pictures: dict[tuple[int, Size], Sized] = {}

    @property
    def folder(self) -> Path:
        """Where they lie."""
        assert self.settings.class_data_dir is not None  # the recipe's reading has named one
        return Path(self.settings.class_data_dir)

    def files(self) -> list[Path]:
        """Those that there are, by name."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())

    def notes(self) -> list[str]:
        """Files of the folder that are no images by name."""
        others = passed_over(self.folder) if self.folder.is_dir() else None
        return [] if others is None else [others]

    def digest(self) -> str:
        """sha256 of those that are trained on."""
        return hash_of([content_hash(path) for path in self.paths])

    def ready(self, model: Any, processor: PipelineProcessor, sizes: Sequence[Size], told: Told) -> list[Sized]:
        """All of them at each of these sizes, and it, once the missing ones are drawn.

        Raises: DataError for one that cannot be read.
        """
        if not self.paths:
            self._draw_missing(model, processor, told)
            self.paths = self.files()[: self.settings.num_class_images]
        return [(self._seen(number, size)[0], size) for number in range(len(self.paths)) for size in sizes]

    def pick(self, model: Any, number: int, size: Size) -> Sized:
        """One of them, by a number, covering this size; and the size that it had before."""
        if model.device.type == "meta":
            return np.zeros((*size, 3), np.uint8), size
        return self._seen(number % len(self.paths), size)

    def _seen(self, number: int, size: Size) -> Sized:
        if (number, size) not in self.pictures:
            path = self.paths[number]
            try:
                pixels = read_image(str(path))
            except Dropped as reason:
                raise DataError(f"is an {reason}", "take it out", file=str(path)) from None
            self.pictures[number, size] = covering(pixels, size), (pixels.shape[0], pixels.shape[1])
        return self.pictures[number, size]

    def _draw_missing(self, model: Any, processor: PipelineProcessor, told: Told) -> None:
        """As the base draws them, its adapter bypassed."""
        settings, there = self.settings, len(self.files())
        how = Drawing(settings.num_inference_steps, settings.guidance_scale, self.resolution, self.resolution)
        assert settings.class_prompt is not None
        if there >= settings.num_class_images:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        net = model.base.net
        numbers = [number for number in range(settings.num_class_images) if not self._place(number).exists()]
        with model.training_mode(False), calling(replace(current_call(), bypassed=True)), net.beside_on(model.device):
            for done, number in enumerate(numbers[: settings.num_class_images - there]):
                told("class images drawn", done, settings.num_class_images - there)
                seed = seed_for("class picture", settings.class_prompt, number)
                drawn = draw_pictures(net, processor, [settings.class_prompt], [seed], how)[0]
                write_bytes(self._place(number), png_bytes(drawn))

    def _place(self, number: int) -> Path:
        return self.folder / f"class-{number:05d}.png"
