"""`adapter: {method: full}` settings of full fine-tuning: no adapter, the base's own weights are trained."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import AdapterSettings, Several, Text, TextOrTexts, metamath_rate


class FullSettings(AdapterSettings):
    """Trains the base itself, in float32 whatever it is computed in; the run's result is model/, not adapter/. Takes
    16 bytes a trained weight (18 where the base is computed in 16 bits) beside the activations."""

    summary = "the base's own weights, all of them or some modules'"
    default_learning_rate = metamath_rate(1e-5, "full-finetuning/llama-3.2-3B-lr_0.00001")
    trains_base = True

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: TextOrTexts = Field(
        "all-weights", description="all-weights, modules by name or name ending, or a regular expression"
    )
