"""Settings of products and rotations for tests over every method; each adapts the layer called `layer` (48 x 64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunekit.recipe.adapters.loha import LohaSettings
from tunekit.recipe.adapters.lokr import LokrSettings

NAMES = ("layer",)
PRODUCTS: dict[str, Callable[[], Any]] = {
    "loha": lambda: LohaSettings(r=4, alpha=2, target_modules=NAMES),
    "lokr": lambda: LokrSettings(r=2, alpha=3, target_modules=NAMES),
    "lokr-both": lambda: LokrSettings(r=1, alpha=1, decompose_both=True, decompose_factor=4, target_modules=NAMES),
    "lokr-whole": lambda: LokrSettings(r=8, alpha=8, target_modules=NAMES),
}
