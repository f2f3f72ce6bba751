"""Image augmentation: random changes that depend only on a seed, and give images of the size to train on.

torchvision's transforms use torch's global generator. Each call seeds this generator, and restores
its state afterwards.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tunekit.contracts import Pixels
from tunekit.data.encoding.images import HOW_TO_INSTALL
from tunekit.errors import InputError
from tunekit.machine.versions import needed


def transforms() -> Any:
    """torchvision's transforms module. Raises: InputError if torchvision is not installed."""
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # the second: its operators do not fit this torch
        raise InputError(*needed("image augmentation", HOW_TO_INSTALL, error)) from error
    return v2


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation. `crop_scale`: minimum and maximum share of the image's area in a random crop; None:
    no crop, because images already have the size to train on."""

    resolution: int
    crop_scale: tuple[float, float] | None
    random_flip: bool
    randaugment_ops: int
    randaugment_magnitude: int
    random_erasing: float

    @cached_property
    def steps(self) -> Any:
        """The transforms of an image (3, H, W)."""
        v2, side = transforms(), self.resolution
        steps = [v2.Identity() if self.crop_scale is None else v2.RandomResizedCrop(side, self.crop_scale)]
        steps += [v2.RandomHorizontalFlip()] if self.random_flip else []
        steps += [v2.RandAugment(self.randaugment_ops, self.randaugment_magnitude)] if self.randaugment_ops else []
        steps += [v2.RandomErasing(self.random_erasing)] if self.random_erasing else []
        return v2.Compose(steps)

    def changed(self, pixels: Pixels, seed: int) -> Pixels:
        """(side, side, 3) the augmented image; equal seeds give equal images."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = self.steps(torch.tensor(pixels.copy()).permute(2, 0, 1))  # (3, side, side)
        return found.permute(1, 2, 0).contiguous().numpy()
