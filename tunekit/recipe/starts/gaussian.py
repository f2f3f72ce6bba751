"""`start: gaussian`: A is normal with standard deviation 1 / r, B is 0."""

from tunekit.recipe.bases.section import StartSettings


class GaussianSettings(StartSettings):
    """An initialisation of LoRA: A is normal, B is 0."""

    summary = "A is normal with standard deviation 1 / r, B is 0"
    fills_experts = True
    decomposes = False
