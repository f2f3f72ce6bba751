"""`start: lora_ga`: A and B are singular vectors of each matrix's gradient (Wang et al. 2024)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import CalibratedStart, Count, Positive


class LoraGaSettings(CalibratedStart):
    """The first steps then follow those of full fine-tuning."""

    summary = "singular vectors of each matrix's gradient"
    looks_at = "gradients"
    moves_weights = True
    needs_twice_the_rank = True

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = Field(
        "ArB2r", description="A from the first r and B from the next r, the reverse, or by turns"
    )
    scale: Literal["stable", "unit", "peft"] = Field(
        "stable",
        description="stable: both times outputs^(1/4) / sqrt(gamma); unit: 1; peft: B alone, times singular values too",
    )
    gamma: Positive = Field(16.0, description="divides the size of A and B under stable and peft")
    iterations: Count | None = Field(
        4, description="power iterations of a fast, randomized decomposition; null: the exact one, which takes long"
    )
