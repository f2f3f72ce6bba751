"""`start: lora_ga`: A and B are singular vectors of each matrix's gradient (Wang et al. 2024)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import CalibratedStart, Count, Positive


class LoraGaSettings(CalibratedStart):
    """With these values the first steps follow the steps of full fine-tuning."""

    summary = "singular vectors of each matrix's gradient"
    looks_at = "gradients"
    moves_weights = True
    needs_twice_the_rank = True

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = Field(
        "ArB2r",
        description="ArB2r: A from the first r singular vectors, B from the next r; A2rBr: the reverse; "
        "ArBr: alternately",
    )
    scale: Literal["stable", "unit", "peft"] = Field(
        "stable",
        description="stable: scale A and B by outputs^(1/4) / sqrt(gamma); unit: no scale; peft: scale only B, also "
        "by the singular values",
    )
    gamma: Positive = Field(16.0, description="divides the scale of A and B with scale: stable or peft")
    iterations: Count | None = Field(
        4, description="number of power iterations of a fast, randomized decomposition; null: exact, which takes long"
    )
