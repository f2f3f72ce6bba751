"""`adapter: {method: bitfit}`: settings of BitFit (Ben Zaken et al. 2022)."""

from pydantic import Field

from tunekit.recipe.bases.section import AdapterSettings, TextOrTexts


class BitfitSettings(AdapterSettings):
    """Trains only the base's own biases. PEFT has no type for this method, so only tunekit can load the folder."""

    summary = "trains only the base's own biases (PEFT cannot load the result)"

    target_modules: TextOrTexts = Field(
        "all-biases", description="all-biases, names or name endings of modules with biases, or a regular expression"
    )
