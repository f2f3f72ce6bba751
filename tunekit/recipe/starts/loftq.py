"""`start: loftq`: A and B make up for what quantization took from each matrix (Li et al. 2023)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import StartSettings


class LoftqSettings(StartSettings):
    """The best correction of rank r of a quantized base."""

    divides_by_scaling = True
    looks_at = "original"

    method: Literal["loftq"] = Field("loftq", description="the r largest singular values of W - dequantized(W)")
