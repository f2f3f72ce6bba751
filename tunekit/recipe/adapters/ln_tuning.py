"""`adapter: {method: ln_tuning}`: settings of LN tuning (Zhao et al. 2023)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import AdapterSettings, Several, Text, TextOrTexts


class LnTuningSettings(AdapterSettings):
    """Trains only the weights and biases of the norms, by default of all norms as in PEFT's MetaMathQA comparison.
    That comparison learned nothing (accuracy 0) at its general learning rate of 1e-4: try a higher rate."""

    summary = "the base's own norms"

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: TextOrTexts = Field(
        "all-norms", description="all-norms, a list of names or name endings, or a regular expression"
    )
