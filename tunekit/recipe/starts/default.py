"""`start: default`: A uniform within 1 / sqrt(inputs), B = 0."""

from tunekit.recipe.bases.section import StartSettings


class DefaultSettings(StartSettings):
    """A uniform, B = 0."""

    summary = "A uniform, B = 0"
    fills_experts = True
    decomposes = False
