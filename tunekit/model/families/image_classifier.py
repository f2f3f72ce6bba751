"""Image classifiers: a vision transformer with one row of logits per picture.

Comes in: a net as transformers builds it.  Goes out: `ImageClassifierFamily`, and what its processor says of pixels.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunekit.contracts import Processor, Stages, Tokenizer
from tunekit.errors import ModelError
from tunekit.files.cache_folder import hash_of
from tunekit.model.families.classifier import ClassifierFamily
from tunekit.model.families.structure import call_accepted, text_config
from tunekit.model.storage.source import find_source, read_json
from tunekit.recipe.model import ModelSection

CONFIG = "preprocessor_config.json"
SIDE = 224  # where neither the processor nor the model says how large a picture is
HALF = (0.5, 0.5, 0.5)  # mean and deviation, likewise


@dataclass(frozen=True)
class PixelProcessor:
    """What preprocessor_config.json says: how large a picture is, and how its numbers are scaled."""

    folder: Path

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
        """sha256 of the file."""
        return hash_of(self.config)

    @property
    def resolution(self) -> int:
        """Pixels of a side. Raises: ModelError where the file says no number."""
        size = self.config.get("crop_size") or self.config.get("size", SIDE)
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        if not isinstance(size, int) or size < 1:
            raise ModelError("says no size of a picture", "write objective.resolution", file=str(self.folder / CONFIG))
        return size

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel, in numbers from 0 to 1."""
        return tuple(self.config.get("image_mean") or HALF)

    @property
    def deviation(self) -> tuple[float, ...]:
        """Likewise."""
        return tuple(self.config.get("image_std") or HALF)

    def save(self, folder: Path) -> None:
        """The file into a model folder."""
        if (self.folder / CONFIG).exists():
            shutil.copyfile(self.folder / CONFIG, folder / CONFIG)


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
        """(B, C)."""
        dtype = next(net.parameters()).dtype
        found: torch.Tensor = call_accepted(net, {"pixel_values": inputs["pixel_values"].to(dtype)}).logits
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
