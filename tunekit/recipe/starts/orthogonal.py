"""`start: orthogonal`: neither A nor B is 0, but B A is: their rows span orthogonal halves of the rank."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import StartSettings


class OrthogonalSettings(StartSettings):
    """A and B that cancel out."""

    needs_even_rank = True
    decomposes = False

    method: Literal["orthogonal"] = Field("orthogonal", description="A and B are not 0, but B A is")
