"""`adapter: {method: road}`: settings of RoAd (Liao and Monz 2024)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import Count, TargetedSettings, metamath_rate


class RoadSettings(TargetedSettings):
    """Rotates and scales pairs of each layer's outputs. The defaults are from PEFT's RoadConfig; PEFT's
    MetaMathQA comparison used a learning rate of 1e-3."""

    summary = "trained rotations of pairs of outputs"
    default_learning_rate = metamath_rate(1e-3, "road/llama-3.2-3B-lr_0.001")

    variant: Literal["road_1", "road_2", "road_4"] = Field(
        "road_1", description="number of trained numbers per pair of outputs: 2 (road_1), 4 (road_2) or 8 (road_4)"
    )
    group_size: Count = Field(64, description="size of the groups within which outputs are paired; an even number")
