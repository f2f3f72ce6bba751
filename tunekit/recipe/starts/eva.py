"""`start: eva`: A spans the directions in which each layer's inputs vary most (Paischer et al. 2024)."""

from typing import Annotated

from pydantic import Field

from tunekit.recipe.bases.section import CalibratedStart, Number


class EvaSettings(CalibratedStart):
    """A is made of the principal components of each layer's inputs, B is 0."""

    summary = "A: principal components of each layer's inputs; B: 0"
    looks_at = "inputs"

    rho: Annotated[Number, Field(ge=1, le=1000)] = Field(
        1.0,
        description="layers whose components explain more variance get higher ranks, up to rho * r; 1: every layer has "
        "rank r",
    )
    supervised_only: bool = Field(True, description="use only the inputs at positions with a loss")
    whiten: bool = Field(False, description="divide each component by the square root of its singular value")
    adjust_alpha: bool = Field(
        True, description="change a layer's alpha with its rank, so that alpha / r stays the same"
    )
