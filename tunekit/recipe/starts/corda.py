"""`start: corda`: A and B are a part of each matrix, weighted by the covariance of its inputs (Yang et al. 2024)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import CalibratedStart


class CordaSettings(CalibratedStart):
    """Singular value decomposition of W C, where C is the covariance of the inputs."""

    summary = "a part of W, weighted by the covariance of its inputs"
    looks_at = "inputs"
    moves_weights = True
    divides_by_scaling = True

    mode: Literal["ipm", "kpm"] = Field(
        "ipm",
        description="ipm: train the r largest directions, to learn from these data; kpm: train the r smallest "
        "directions, to keep the knowledge about these data",
    )
