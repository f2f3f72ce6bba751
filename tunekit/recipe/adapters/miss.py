"""`adapter: {method: miss}`: settings of MiSS, matrix shard sharing (Kang and Yin 2024, also called Bone)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import Count, Fraction, TargetedSettings


class MissSettings(TargetedSettings):
    """One trained shard, shared by all column blocks of a matrix."""

    summary = "one trained shard for all column blocks of a matrix"

    r: Count = Field(64, description="number of columns in a block")
    variant: Literal["balance", "bat", "mini"] = Field(
        "balance", description="bat: the update also depends on the base's matrix; mini: a narrower shard is repeated"
    )
    mini_r: Count = Field(
        1, description="for variant mini: the width of the shard; it must divide the outputs of every layer"
    )
    dropout: Fraction = Field(0.0, description="dropout of the update's input in training; not with variant bat")
