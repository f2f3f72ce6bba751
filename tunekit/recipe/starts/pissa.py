"""`start: pissa`: A and B contain the r largest singular values and vectors of each matrix (Meng et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, StartSettings


class PissaSettings(StartSettings):
    """B A is the principal part of W, from an exact or a fast singular value decomposition."""

    summary = "the r largest singular values and vectors of W"
    moves_weights = True
    divides_by_scaling = True

    iterations: Count | None = Field(
        None,
        description="number of power iterations (4 to 16) of a fast, randomized decomposition; null: an exact, slow "
        "decomposition",
    )
