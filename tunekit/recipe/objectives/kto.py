"""`objective: kto` Kahneman-Tversky optimization: answers marked as good or bad, without pairs, held to the model as it
was before step 1."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import ObjectiveSettings, Positive, PublishedRate
from tunekit.records import Shows

LOGGED = ("rewards_chosen", "rewards_rejected", "rewards_margins", "logps_chosen", "logps_rejected", "kl")


class KtoSettings(ObjectiveSettings):
    """TRL's names and defaults."""

    summary = "answers marked as good or bad, held to the reference model"
    example = "unpaired"
    shows = Shows(unit="answer")
    reference = "policy at step 0"
    sums = ("loss", "units", *LOGGED)
    first_order = 80
    default_learning_rate = PublishedRate(5e-6, "hiyouga/LLaMA-Factory, examples/train_lora/llama3_lora_kto.yaml")

    beta: Positive = Field(0.1, description="how strongly the policy is held to the reference")
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="apo_zero_unpaired: without the KL, for answers better than the model's own"
    )
    precompute_ref_log_probs: bool = Field(
        False, description="score each row's reference once, by itself, and keep it for later epochs and evaluations"
    )
    desirable_weight: Positive = Field(1.0, description="of the loss of good answers")
    undesirable_weight: Positive = Field(1.0, description="of the loss of bad answers")
    unusable_rows: Literal["error", "drop"] = Field(
        "error", description="a row without a prompt or with an empty answer: stop, or leave it out"
    )
