"""`objective: sft`: supervised fine-tuning, with next-token cross entropy on the supervised tokens."""

from tunekit.recipe.bases.section import ObjectiveSettings


class SftSettings(ObjectiveSettings):
    """Settings of supervised fine-tuning. `method` is the only setting."""

    summary = "next-token cross entropy on the supervised tokens"
    supervised = True
    one_sequence = True
    first_order = 90
