"""`objective: distill`: knowledge distillation. The model learns a teacher's probabilities of the next token."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tunekit.recipe.bases.section import Number, ObjectiveSettings, Positive
from tunekit.recipe.model import ModelSection

UnitShare = Annotated[Number, Field(ge=0, le=1)]


class DistillSettings(ObjectiveSettings):
    """Settings of knowledge distillation. The names are TRL's. The default of beta is 0 instead of TRL's 1, because the
    tokens come from the data, not from the student."""

    summary = "learns a teacher model's probabilities of the next token"
    free_keys = ("teacher_streaming",)
    needs_recipe = True
    one_sequence = True

    teacher: ModelSection = Field(
        description="the teacher, with the student's vocabulary: a name, or a mapping as in the section model"
    )
    teacher_streaming: Literal["off", "host", "disk"] = Field(
        "off",
        description="where the teacher's layers are stored; host or disk: each layer is copied to the device "
        "once per step",
    )
    beta: UnitShare = Field(
        0.0,
        description="0: forward KL(teacher | student); 1: reverse KL; between 0 and 1: generalised "
        "Jensen-Shannon divergence",
    )
    temperature: Positive = Field(1.0, description="the temperature of the teacher's and the student's distribution")
    kd_ratio: UnitShare = Field(
        1.0,
        description="weight of the divergence; 1 - kd_ratio is the weight of the cross entropy on the data's tokens",
    )

    @classmethod
    def is_log_loss(cls, facts: Mapping[str, Any]) -> bool:
        return False
