"""`start: gaussian`: A from a normal distribution of deviation 1 / r, B = 0."""

from tunekit.recipe.bases.section import StartSettings


class GaussianSettings(StartSettings):
    """A normal, B = 0."""

    summary = "A normal with deviation 1 / r, B = 0"
    fills_experts = True
    decomposes = False
