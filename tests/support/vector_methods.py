"""Settings of the scales and vectors for tests over every method; each adapts the layer called `layer` (48 x 64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunekit.recipe.adapters.c3a import C3aSettings
from tunekit.recipe.adapters.fourierft import FourierftSettings
from tunekit.recipe.adapters.ia3 import Ia3Settings
from tunekit.recipe.adapters.randlora import RandloraSettings
from tunekit.recipe.adapters.road import RoadSettings
from tunekit.recipe.adapters.vblora import VbloraSettings
from tunekit.recipe.adapters.vera import VeraSettings

NAMES = ("layer",)
VECTORS: dict[str, Callable[[], Any]] = {
    "ia3": lambda: Ia3Settings(target_modules=NAMES),
    "ia3-feedforward": lambda: Ia3Settings(target_modules=NAMES, feedforward_modules=NAMES),
    "vera": lambda: VeraSettings(r=8, target_modules=NAMES),
    "fourierft": lambda: FourierftSettings(n_frequency=200, scaling=20.0, target_modules=NAMES),
    "randlora": lambda: RandloraSettings(r=10, alpha=20, target_modules=NAMES),
    "vblora": lambda: VbloraSettings(num_vectors=12, vector_length=8, target_modules=NAMES),
    "road_1": lambda: RoadSettings(group_size=16, target_modules=NAMES),
    "road_2": lambda: RoadSettings(group_size=16, variant="road_2", target_modules=NAMES),
    "road_4": lambda: RoadSettings(group_size=16, variant="road_4", target_modules=NAMES),
    "c3a": lambda: C3aSettings(block_size=16, target_modules=NAMES),
}
SCALED_OUTPUTS = {"ia3", "ia3-feedforward", "road_1", "road_2", "road_4"}  # the base's own rounding is scaled too
