"""`objective: sft` supervised fine-tuning: next-token cross entropy on the supervised tokens."""

from tunekit.recipe.bases.section import ObjectiveSettings


class SftSettings(ObjectiveSettings):
    """No further settings."""

    summary = "next-token cross entropy on the supervised tokens"
    supervised = True
    one_sequence = True
    first_order = 90
