"""`start: default`: A uniform within 1 / sqrt(inputs), B = 0."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tunekit.recipe.bases.section import StartSettings


class DefaultSettings(StartSettings):
    """A uniform, B = 0."""

    fills_experts: ClassVar[bool] = True
    decomposes: ClassVar[bool] = False

    method: Literal["default"] = Field("default", description="A uniform, B = 0")
