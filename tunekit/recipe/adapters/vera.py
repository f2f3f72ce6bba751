"""`adapter: {method: vera}`: settings of VeRA (Kopiczko et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, Number, TargetedSettings, metamath_rate


class VeraSettings(TargetedSettings):
    """Two trained vectors per layer, which scale random matrices that all layers share. The defaults are from PEFT's
    VeraConfig, as in PEFT's MetaMathQA comparison."""

    summary = "trained scales of one frozen random update"
    default_learning_rate = metamath_rate(1e-3, "vera/llama-3.2-3B-default")

    r: Count = Field(256, description="rank of the shared matrices")
    d_initial: Number = Field(0.1, description="initial value of the scales between the two matrices")
    dropout: Fraction = fields.DROPOUT
    projection_prng_key: CountOrZero = Field(0, description="seed of the frozen random matrices, drawn as in PEFT")
    save_projection: bool = Field(True, description="whether the adapter's file contains the frozen matrices")
