"""`objective: kto`: Kahneman-Tversky optimization. The model learns from answers marked as good or bad, and stays close
to the model before step 1."""

from typing import Literal

from pydantic import Field

from tunekit.basics import Shows
from tunekit.recipe.bases.section import AutoOrBool, ObjectiveSettings, Positive, PublishedRate

LOGGED = ("rewards_chosen", "rewards_rejected", "rewards_margins", "logps_chosen", "logps_rejected", "kl")


class KtoSettings(ObjectiveSettings):
    """Settings of KTO. The names and defaults are TRL's."""

    summary = "learns from answers marked as good or bad, close to the reference model"
    example = "unpaired"
    shows = Shows(unit="answer")
    reference = "policy at step 0"
    training_keys = ("precompute_ref_log_probs",)
    sums = ("loss", "units", *LOGGED, "chosen_units", "rejected_units")
    first_order = 80
    default_learning_rate = PublishedRate(5e-6, "hiyouga/LLaMA-Factory, examples/train_lora/llama3_lora_kto.yaml")

    @property
    def single_row(self) -> str:
        """The reason why a step must not have only one row; empty with a loss that has no KL."""
        return "kto estimates its KL from the answers of other rows of the step" if self.loss_type == "kto" else ""

    beta: Positive = Field(0.1, description="how strongly the model is kept close to the reference")
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description="apo_zero_unpaired: a loss without the KL; use it if the good answers are better than the model's "
        "answers",
    )
    precompute_ref_log_probs: AutoOrBool = Field(
        "auto",
        description="compute the reference model's log-probabilities once per row, for all epochs and evaluations; "
        "auto: on a CPU, in runs of more than one epoch",
    )
    desirable_weight: Positive = Field(1.0, description="weight of the loss of good answers")
    undesirable_weight: Positive = Field(1.0, description="weight of the loss of bad answers")
    unusable_rows: Literal["error", "drop"] = Field(
        "error", description="for a row without a prompt or with an empty answer. error: stop; drop: leave the row out"
    )
