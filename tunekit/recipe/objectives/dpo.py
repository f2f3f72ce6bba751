"""`objective: dpo`: direct preference optimization. The model learns to prefer chosen answers over rejected ones, and
stays close to the model before step 1."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from tunekit.recipe.bases.pair_settings import PairSettings
from tunekit.recipe.bases.section import AutoOrBool, NotNegative, Number, Positive, Several

DpoLossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "apo_zero",
    "apo_down",
    "discopop",
    "sppo_hard",
    "aot",
    "sft",
]
SMOOTHED = ("robust", "exo_pair", "aot")


NAMES = {"enum": list(get_args(DpoLossType))}


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


LossTypes = Annotated[
    Several[DpoLossType],
    BeforeValidator(_listed),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [NAMES, {"type": "array", "minItems": 1, "items": NAMES}]}),
]


class DpoSettings(PairSettings):
    """Settings of DPO. The names and defaults are TRL's."""

    summary = "prefers chosen over rejected answers, close to the reference model"
    reference = "policy at step 0"
    training_keys = ("precompute_ref_log_probs",)
    first_order = 50

    beta: Positive = Field(
        0.1, description="how strongly the model is kept close to the reference; for ipo, the paper's tau"
    )
    loss_type: LossTypes = Field(("sigmoid",), description="one loss, or several losses that are added")
    loss_weights: Several[Number] | None = Field(None, description="one weight for each loss; null: every weight is 1")
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.0,
        description="for robust and aot: the assumed share of pairs whose answers are swapped; for exo_pair: the "
        "loss's epsilon, above 0",
    )
    discopop_tau: Positive = Field(0.05, description="for discopop: the temperature that blends its two losses")
    precompute_ref_log_probs: AutoOrBool = Field(
        "auto",
        description="compute the reference model's log-probabilities once per row, for all epochs and evaluations; "
        "auto: on a CPU, in runs of more than one epoch",
    )
    rpo_alpha: NotNegative | None = Field(
        None,
        description="weight of the mean loss on the chosen answers' tokens; equal to loss_type sft with this weight",
    )
    ld_alpha: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="weight of the longer answer's tokens beyond the length of the shorter answer; null: 1"
    )

    @property
    def weighted_losses(self) -> list[tuple[str, float]]:
        """All losses with their weights."""
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        return [*zip(self.loss_type, weights, strict=True), *([("sft", self.rpo_alpha)] if self.rpo_alpha else [])]

    @model_validator(mode="after")
    def _consistent(self) -> DpoSettings:
        if len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError("loss_type names a loss twice; give it one weight")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            counts = f"{len(self.loss_weights)} weights for {len(self.loss_type)} losses"
            raise ValueError(f"loss_weights has {counts}; write one weight for each loss")
        if not any(weight for _, weight in self.weighted_losses):
            raise ValueError("loss_weights are all 0, so nothing is learned; give one loss a weight above 0")
        changed = self.discopop_tau != type(self).model_fields["discopop_tau"].default
        if changed and "discopop" not in self.loss_type:
            raise ValueError("discopop_tau has an effect only with loss_type discopop; remove it")
        if self.rpo_alpha is not None and "sft" in self.loss_type:
            raise ValueError("rpo_alpha adds the same term as loss_type sft; keep one of them")
        if self.label_smoothing and not set(self.loss_type) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing has an effect only with {', '.join(SMOOTHED)}; remove it, or choose one of "
                "these losses"
            )
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("exo_pair needs label_smoothing above 0; the paper uses 1e-3")
        return self
