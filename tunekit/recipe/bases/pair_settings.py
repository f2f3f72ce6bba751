"""Settings shared by the objectives that train on pairs of answers."""

from typing import ClassVar, Literal

from pydantic import Field

from tunekit.basics import Shows
from tunekit.recipe.bases.section import ObjectiveSettings, PublishedRate

REWARDS = (
    "rewards_chosen",
    "rewards_rejected",
    "rewards_margins",
    "rewards_accuracies",
    "logps_chosen",
    "logps_rejected",
)


class PairSettings(ObjectiveSettings):
    """Each row is a prompt with a chosen and a rejected answer."""

    example = "preference"
    shows = Shows(unit="pair")
    sums: ClassVar[tuple[str, ...]] = ("loss", "units", *REWARDS)
    default_learning_rate = PublishedRate(
        5e-6, "huggingface/trl 1.16, LoRA example of trl/scripts/dpo.py: ten times the rate of full fine-tuning"
    )

    unusable_pairs: Literal["error", "drop"] = Field(
        "error",
        description="for a pair without a prompt, with an empty answer, with equal answers, or with an answer that "
        "does not end with the assistant's turn. error: stop; drop: leave the pair out",
    )
