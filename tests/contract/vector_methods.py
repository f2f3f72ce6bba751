"""Settings of the scales and vectors for tests over every method; each adapts the layer called `layer` (48 x 64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunekit.recipe.adapters.ia3 import Ia3Settings

NAMES = ("layer",)
VECTORS: dict[str, Callable[[], Any]] = {
    "ia3": lambda: Ia3Settings(target_modules=NAMES),
    "ia3-feedforward": lambda: Ia3Settings(target_modules=NAMES, feedforward_modules=NAMES),
}
SCALED_OUTPUTS = {"ia3", "ia3-feedforward"}  # the base's own rounding is scaled too
