"""Image classifiers: a vision transformer with one row of logits per picture.

Comes in: a net as transformers builds it.  Goes out: `ImageClassifierFamily`, and what its processor says of pixels.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunekit.contracts import Processor, Stages, Tokenizer
from tunekit.errors import ModelError
from tunekit.files.cache_folder import hash_of
from tunekit.files.durable import write_json
from tunekit.model.families.classifier import ClassifierFamily
from tunekit.model.families.structure import call_accepted, text_config
from tunekit.model.storage.source import find_source, read_json
from tunekit.model.transformers_guard import quiet
from tunekit.recipe.model import ModelSection

CONFIG = "preprocessor_config.json"
SIDE = 224  # where neither the processor nor the model says how large a picture is
PLAIN = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))  # black, and each channel alone


@dataclass(frozen=True)
class PixelProcessor:
    """What the model's own processor does: how large a picture is, and how its numbers are scaled.

    `side`: pixels of a side, where the recipe says another number.
    """

    folder: Path
    side: int | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: it reads no text."""
        return None

    @cached_property
    def config(self) -> dict[str, Any]:
        """Of the file, else what the model's configuration says of its pictures."""
        if (self.folder / CONFIG).exists():
            return read_json(self.folder / CONFIG)
        size = read_json(self.folder / "config.json").get("image_size", SIDE)
        return {"size": size[0] if isinstance(size, list) else size}

    @property
    def fingerprint(self) -> str:
        """sha256 of the file, which alone decides rows."""
        return hash_of(self.config)

    @property
    def resolution(self) -> int:
        """Pixels of a side. Raises: ModelError where the file says no number."""
        if self.side is not None:
            return self.side
        size = self.config.get("crop_size") or self.config.get("size", SIDE)
        if isinstance(size, dict):
            if size.get("height") != size.get("width"):
                what = (
                    f"asks for pictures of {size['width']} x {size['height']} pixels, and only squares are trained on"
                )
                raise ModelError(what, "write objective.resolution", file=str(self.folder / CONFIG))
            size = size.get("height") or size.get("shortest_edge")
        if not isinstance(size, int) or size < 1:
            raise ModelError("says no size of a picture", "write objective.resolution", file=str(self.folder / CONFIG))
        return size

    @cached_property
    def scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(C, 3) and (C,): pixels p of 0 to 255 become scale p + offset, as the model's own processor makes them.

        Every processor scales each pixel by itself, by a factor, mean and deviation or in another order of channels, so
        that four plain pictures tell all of it.  Without a file: to -1 .. 1.
        """
        if not (self.folder / CONFIG).exists():
            return torch.eye(3) / 127.5, -torch.ones(3)
        black, *others = (self._of_plain(colour) for colour in PLAIN)
        return torch.stack([(each - black) / 255.0 for each in others], dim=1).float(), black.float()

    def _of_plain(self, colour: tuple[int, int, int]) -> torch.Tensor:
        """(C,) float64 of the middle of a picture of one colour. Raises: ModelError."""
        picture = np.full((SIDE, SIDE, 3), colour, np.uint8)
        try:
            with quiet():
                from transformers import AutoImageProcessor

                own = AutoImageProcessor.from_pretrained(str(self.folder), local_files_only=True)
                made = own(images=picture, return_tensors="pt")["pixel_values"][0]
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            what = f"is no processor of pictures that can be used ({first})"
            raise ModelError(what, "fetch the model again", file=str(self.folder / CONFIG)) from error
        middle: torch.Tensor = made[:, made.shape[1] // 2, made.shape[2] // 2].double()
        return middle

    def save(self, folder: Path) -> None:
        """The file into a model folder, with the size that was trained on."""
        if not (self.folder / CONFIG).exists():
            return
        if self.side is None:
            shutil.copyfile(self.folder / CONFIG, folder / CONFIG)
            return
        share = self.side / PixelProcessor(self.folder).resolution
        sizes = {key: _sized(self.config[key], share) for key in ("size", "crop_size") if self.config.get(key)}
        write_json(folder / CONFIG, {**self.config, **sizes})


def _sized(size: Any, share: float) -> Any:
    """A size of a processor's file, so many times as large."""
    if isinstance(size, Mapping):
        return {name: round(value * share) if isinstance(value, int) else value for name, value in size.items()}
    return round(size * share)


@dataclass(frozen=True)
class ImageClassifierFamily(ClassifierFamily):
    """Pixels (B, 3, H, W) in, logits (B, C) out, C labels."""

    name: str = "image_classifier"
    task_type: str | None = None
    text: str = "an image classifier"
    reads_ids: bool = False
    ids: str | None = None

    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def processor(self, section: ModelSection) -> Processor:
        """How its pictures are scaled."""
        return PixelProcessor(find_source(section, weights=False).folder)

    def decoder(self, net: nn.Module) -> bool:
        """Never."""
        return False

    def logits(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, C). Pictures of another size than the model's have positions between its own."""
        dtype = next(net.parameters()).dtype
        given: dict[str, Any] = {"pixel_values": inputs["pixel_values"].to(dtype), "interpolate_pos_encoding": True}
        found: torch.Tensor = call_accepted(net, given).logits
        return found

    def trial_inputs(self, net: nn.Module) -> dict[str, torch.Tensor]:
        size = getattr(text_config(net), "image_size", SIDE)
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator("cpu").manual_seed(0)
        return {"pixel_values": torch.randn(1, 3, height, width, generator=generator)}

    def embedding_name(self, net: nn.Module) -> str | None:
        return None

    def learned_positions(self, net: nn.Module) -> int | None:
        return None

    def stages(self, net: nn.Module) -> Stages | None:
        return None
