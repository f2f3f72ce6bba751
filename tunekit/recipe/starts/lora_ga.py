"""`start: lora_ga`: A and B are singular vectors of each matrix's gradient (Wang et al. 2024)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import CalibratedStart, Count, Positive


class LoraGaSettings(CalibratedStart):
    """Settings of LoRA-GA. A and B start so that the first steps are close to the steps of full fine-tuning."""

    summary = "singular vectors of each matrix's gradient"
    looks_at = "gradients"
    moves_weights = True
    needs_twice_the_rank = True

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = Field(
        "ArB2r",
        description="ArB2r: A from the first r singular vectors, B from the next r; A2rBr: B from the first r, A from "
        "the next r; ArBr: A and B take singular vectors alternately",
    )
    scale: Literal["stable", "unit", "peft"] = Field(
        "stable",
        description="stable: multiply A and B by outputs^(1/4) / sqrt(gamma); unit: do not scale; peft: multiply "
        "only B, by this factor and the singular values",
    )
    gamma: Positive = Field(16.0, description="gamma in the factor outputs^(1/4) / sqrt(gamma) of `scale`")
    iterations: Count | None = Field(
        4,
        description="number of power iterations of a fast, randomized decomposition; null: an exact, slow "
        "decomposition",
    )
