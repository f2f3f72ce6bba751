"""A picture changed another way by each seed: pixels and settings go in, pixels of the trained size come out.

torchvision's transforms draw from torch's own generator, which is seeded for the length of a call and then as before.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tunekit.contracts import Pixels
from tunekit.data.encoding.images import HOW_TO_INSTALL
from tunekit.errors import InputError


def transforms() -> Any:
    """torchvision's transforms. Raises: InputError where it is not installed."""
    try:
        from torchvision.transforms import v2
    except ImportError:
        raise InputError("images are changed by torchvision, which is not installed", HOW_TO_INSTALL) from None
    return v2


@dataclass(frozen=True)
class Augmentation:
    """How pictures are changed. `crop_scale`: shares of a picture that a crop may have; None: it has the size already,
    and all of it is seen."""

    resolution: int
    crop_scale: tuple[float, float] | None
    random_flip: bool
    randaugment_ops: int
    randaugment_magnitude: int
    random_erasing: float

    @cached_property
    def steps(self) -> Any:
        """The transforms of a picture (3, H, W)."""
        v2, side = transforms(), self.resolution
        steps = [v2.Identity() if self.crop_scale is None else v2.RandomResizedCrop(side, self.crop_scale)]
        steps += [v2.RandomHorizontalFlip()] if self.random_flip else []
        steps += [v2.RandAugment(self.randaugment_ops, self.randaugment_magnitude)] if self.randaugment_ops else []
        steps += [v2.RandomErasing(self.random_erasing)] if self.random_erasing else []
        return v2.Compose(steps)

    def changed(self, pixels: Pixels, seed: int) -> Pixels:
        """(side, side, 3) as this seed has it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = self.steps(torch.tensor(pixels.copy()).permute(2, 0, 1))  # (3, side, side)
        return found.permute(1, 2, 0).contiguous().numpy()
