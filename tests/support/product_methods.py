"""Settings of products and rotations for tests over every method; each adapts the layer called `layer` (48 x 64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunekit.recipe.adapters.boft import BoftSettings
from tunekit.recipe.adapters.delora import DeloraSettings
from tunekit.recipe.adapters.gralora import GraloraSettings
from tunekit.recipe.adapters.hira import HiraSettings
from tunekit.recipe.adapters.hra import HraSettings
from tunekit.recipe.adapters.loha import LohaSettings
from tunekit.recipe.adapters.lokr import LokrSettings
from tunekit.recipe.adapters.miss import MissSettings
from tunekit.recipe.adapters.oft import OftSettings
from tunekit.recipe.adapters.shira import ShiraSettings

NAMES = ("layer",)
PRODUCTS: dict[str, Callable[[], Any]] = {
    "loha": lambda: LohaSettings(r=4, alpha=2, target_modules=NAMES),
    "lokr": lambda: LokrSettings(r=2, alpha=3, target_modules=NAMES),
    "lokr-both": lambda: LokrSettings(r=1, alpha=1, decompose_both=True, decompose_factor=4, target_modules=NAMES),
    "lokr-whole": lambda: LokrSettings(r=8, alpha=8, target_modules=NAMES),
    "oft": lambda: OftSettings(block_size=16, target_modules=NAMES),
    "oft-shared": lambda: OftSettings(blocks=8, block_share=True, target_modules=NAMES),
    "oft-exact": lambda: OftSettings(block_size=8, use_cayley_neumann=False, target_modules=NAMES),
    "hra": lambda: HraSettings(r=4, target_modules=NAMES),
    "hra-orthogonal": lambda: HraSettings(r=3, orthogonal=True, target_modules=NAMES),
    "miss": lambda: MissSettings(r=5, target_modules=NAMES),
    "miss-bat": lambda: MissSettings(r=8, variant="bat", target_modules=NAMES),
    "miss-mini": lambda: MissSettings(r=8, variant="mini", mini_r=4, target_modules=NAMES),
    "hira": lambda: HiraSettings(r=4, target_modules=NAMES),
    "boft": lambda: BoftSettings(target_modules=NAMES),
    "boft-butterfly": lambda: BoftSettings(block_size=8, butterfly_factors=3, target_modules=NAMES),
    "gralora": lambda: GraloraSettings(r=4, k=2, alpha=4, target_modules=NAMES),
    "gralora-hybrid": lambda: GraloraSettings(r=4, k=4, alpha=4, hybrid_r=2, target_modules=NAMES),
    "delora": lambda: DeloraSettings(r=4, delora_lambda=2, target_modules=NAMES),
    "shira": lambda: ShiraSettings(r=2, target_modules=NAMES),
}
ROTATIONS = {
    "boft",
    "boft-butterfly",
    "oft",
    "oft-shared",
    "oft-exact",
    "hra",
    "hra-orthogonal",
}  # LLM.int8 rounds other inputs
