"""`adapter: {method: ln_tuning}` settings of LN tuning (Zhao et al. 2023)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import AdapterSettings, Several, Text, TextOrTexts


class LnTuningSettings(AdapterSettings):
    """Trains the weights and biases of the norms alone; all norms are those of PEFT's MetaMathQA comparison,
    which at its general rate of 1e-4 learned nothing (accuracy 0): try higher."""

    summary = "the base's norms themselves"

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: TextOrTexts = Field(
        "all-norms", description="all-norms, a list of names or name endings, or a regular expression"
    )
