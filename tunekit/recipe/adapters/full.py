"""`adapter: {method: full}` settings of full fine-tuning, which trains the base's own weights, without an adapter."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import AdapterSettings, Several, Text, TextOrTexts, metamath_rate


class FullSettings(AdapterSettings):
    """Trains the base itself. Its trained weights are float32, even if the model computes in 16 bits. The run's result
    is model/, not adapter/. Memory, without activations: 16 bytes per trained weight, or 18 if it computes in
    16 bits."""

    summary = "the base's own weights, of all modules or of chosen ones"
    default_learning_rate = metamath_rate(1e-5, "full-finetuning/llama-3.2-3B-lr_0.00001")
    trains_base = True

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: TextOrTexts = Field(
        "all-weights", description="all-weights, modules by name or name ending, or a regular expression"
    )
