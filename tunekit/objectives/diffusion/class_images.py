"""Pictures of the class, by which a model keeps what it knew: those of a folder, and what it lacks drawn by the base.

Settings and a model go in; pixels come out.  Each drawn picture depends on its number alone, so that a run which was
interrupted draws the rest as it would have.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tunekit.contracts import Told
from tunekit.data.encoding.images import Pixels, png_bytes, read_image, resized
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError
from tunekit.files.durable import write_bytes
from tunekit.model.call import calling, current_call, seed_for
from tunekit.model.families.pipeline.drawing import Drawing, draw_pictures
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.recipe.objectives.dreambooth import DreamboothSettings

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Sized = tuple[Pixels, tuple[int, int]]  # a picture, and its height and width as it was found


class ClassImages:
    """The pictures of `class_data_dir`, read once; of a model without values, blank ones."""

    def __init__(self, settings: DreamboothSettings, resolution: int) -> None:
        self.settings, self.resolution = settings, resolution
        self.pictures: list[Sized] = []

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

    def ready(self, model: Any, processor: PipelineProcessor, told: Told) -> list[Sized]:
        """All of them, once the missing ones are drawn. Raises: DataError for one that cannot be read."""
        if not self.pictures:
            self._draw_missing(model, processor, told)
            self.pictures = [self._read(path) for path in self.files()[: self.settings.num_class_images]]
        return self.pictures

    def pick(self, model: Any, number: int) -> Sized:
        """One of them, by a number."""
        if model.device.type == "meta":
            return np.zeros((self.resolution, self.resolution, 3), np.uint8), (self.resolution, self.resolution)
        return self.pictures[number % len(self.pictures)]

    def _read(self, path: Path) -> Sized:
        try:
            pixels = read_image(str(path))
            return resized(pixels, self.resolution), (pixels.shape[0], pixels.shape[1])
        except Dropped as reason:
            raise DataError(f"is an {reason}", "take it out", file=str(path)) from None

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
                told("class pictures drawn", done, settings.num_class_images - there)
                seed = seed_for("class picture", settings.class_prompt, number)
                drawn = draw_pictures(net, processor, [settings.class_prompt], [seed], how)[0]
                write_bytes(self._place(number), png_bytes(drawn))

    def _place(self, number: int) -> Path:
        return self.folder / f"class-{number:05d}.png"
