"""`adapter: {method: full}`: settings of full fine-tuning, which trains the base's own weights, without an adapter."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import AdapterSettings, Several, Text, TextOrTexts, metamath_rate


class FullSettings(AdapterSettings):
    """Trains the base itself. The trained weights are stored in float32, even if the model computes in 16 bits. The
    run's result is in model/, not in adapter/. Without activations, a trained weight takes 16 bytes of memory, or 18
    bytes if the model computes in 16 bits."""

    summary = "trains the base's own weights, in all modules or in chosen modules"
    default_learning_rate = metamath_rate(1e-5, "full-finetuning/llama-3.2-3B-lr_0.00001")
    trains_base = True

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: TextOrTexts = Field(
        "all-weights", description="all-weights, modules by name or name ending, or a regular expression"
    )
