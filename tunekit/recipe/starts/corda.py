"""`start: corda`: A and B take a part of each matrix weighed by the covariance of its inputs (Yang et al. 2024)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import CalibratedStart


class CordaSettings(CalibratedStart):
    """Context-oriented decomposition: of W C, C the covariance of the inputs."""

    summary = "a part of W weighed by the covariance of its inputs"
    looks_at = "inputs"
    moves_weights = True
    divides_by_scaling = True

    mode: Literal["ipm", "kpm"] = Field(
        "ipm", description="ipm: the r largest parts for these data, to learn them; kpm: the r smallest, to keep them"
    )
