"""`adapter: {method: hra}`: settings of HRA, Householder reflection adaptation (Yuan et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, TargetedSettings


class HraSettings(TargetedSettings):
    """A chain of r reflections of each layer's inputs."""

    summary = "a chain of reflections of each layer's inputs"

    r: Count = Field(
        8,
        description="number of reflections; with an even number, the initial model equals the base (up to rounding)",
    )
    orthogonal: bool = Field(False, description="make the vectors of the reflections orthogonal (Gram-Schmidt)")
