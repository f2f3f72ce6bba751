"""`objective: distill` knowledge distillation: the distribution of a teacher over the next token is learned."""

from typing import Annotated, Literal

from pydantic import Field

from tunekit.recipe.bases.section import Number, ObjectiveSettings, Positive
from tunekit.recipe.model import ModelSection

UnitShare = Annotated[Number, Field(ge=0, le=1)]


class DistillSettings(ObjectiveSettings):
    """TRL's names; beta is 0, and not its 1, because the tokens are those of the data and not the student's own."""

    summary = "the next-token distribution of a teacher model"
    free_keys = ("teacher_streaming",)
    needs_recipe = True
    one_sequence = True

    teacher: ModelSection = Field(description="a model over the same vocabulary: a name, or what a model section has")
    teacher_streaming: Literal["off", "host", "disk"] = Field(
        "off", description="where the teacher's layers wait; each is copied to the device once a step, for all its rows"
    )
    beta: UnitShare = Field(
        0.0,
        description="0: forward KL(teacher | student); 1: reverse KL; between: JSD, of both with a mixture",
    )
    temperature: Positive = Field(1.0, description="that both distributions are taken at")
    kd_ratio: UnitShare = Field(
        1.0, description="share of the divergence; the rest is cross entropy on the data's tokens"
    )
