"""`start: pissa`: A and B contain the r largest singular values of each matrix (Meng et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, StartSettings


class PissaSettings(StartSettings):
    """The principal part of W, from an exact or a fast singular value decomposition."""

    summary = "the r largest singular values of W"
    moves_weights = True
    divides_by_scaling = True

    iterations: Count | None = Field(
        None, description="number of power iterations of a fast, randomized decomposition (4 to 16); null: exact"
    )
