"""`start: eva`: A spans the directions in which each layer's inputs vary most (Paischer et al. 2024)."""

from typing import Annotated

from pydantic import Field

from tunekit.recipe.bases.section import CalibratedStart, Number


class EvaSettings(CalibratedStart):
    """Principal components of each layer's inputs as A, B = 0."""

    summary = "principal components of each layer's inputs"
    looks_at = "inputs"

    rho: Annotated[Number, Field(ge=1, le=1000)] = Field(
        1.0, description="ranks are shared out by explained variance, up to rho x r for a layer; 1: every layer has r"
    )
    supervised_only: bool = Field(True, description="look only at the positions that the loss is taken over")
    whiten: bool = Field(False, description="divide each component by the square root of its singular value")
    adjust_alpha: bool = Field(True, description="a layer's alpha follows its rank, so that its scaling stays")
