"""`start: corda`: A and B are a low-rank part of each matrix, chosen by the covariance of its inputs (Yang et al.
2024)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import CalibratedStart


class CordaSettings(CalibratedStart):
    """A and B come from the singular value decomposition of W C, where C is the covariance of the inputs."""

    summary = "a low-rank part of W, chosen by the covariance of its inputs"
    looks_at = "inputs"
    moves_weights = True
    divides_by_scaling = True

    mode: Literal["ipm", "kpm"] = Field(
        "ipm",
        description="ipm: train the r largest singular directions, to learn from these data; kpm: train the r "
        "smallest, to keep the model's knowledge about these data",
    )
