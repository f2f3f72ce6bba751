"""`start: default`: A is uniform between -1 / sqrt(inputs) and 1 / sqrt(inputs), B is 0."""

from tunekit.recipe.bases.section import StartSettings


class DefaultSettings(StartSettings):
    """The default initialisation of LoRA: A is uniform, B is 0."""

    summary = "A is uniform, B is 0"
    fills_experts = True
    decomposes = False
