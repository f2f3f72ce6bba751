"""`start: default`: A uniform within 1 / sqrt(inputs), B = 0."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import StartSettings


class DefaultSettings(StartSettings):
    """A uniform, B = 0."""

    fills_experts = True
    decomposes = False

    method: Literal["default"] = Field("default", description="A uniform, B = 0")
