"""`adapter: {method: bitfit}` settings of BitFit (Ben Zaken et al. 2022)."""

from pydantic import Field

from tunekit.recipe.bases.section import AdapterSettings, TextOrTexts


class BitfitSettings(AdapterSettings):
    """Trains the biases that the base has, and nothing else. PEFT has no such type: the folder is tunekit's own."""

    summary = "the base's biases themselves (no PEFT type)"

    target_modules: TextOrTexts = Field(
        "all-biases", description="all-biases, owners of biases by name or name ending, or a regular expression"
    )
