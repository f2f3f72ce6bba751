"""`adapter: {method: c3a}`: settings of C3A (Chen et al. 2025)."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, TargetedSettings, metamath_rate


class C3aSettings(TargetedSettings):
    """The update is made of circulant blocks. It needs a high learning rate: PEFT's MetaMathQA comparison
    (Llama-3.2-3B) used 3e-1 with blocks of 64."""

    summary = "an update of circulant blocks"
    default_learning_rate = metamath_rate(3e-1, "c3a/llama-3.2-3B-default")

    block_size: Count = Field(64, description="side of a block; it must divide the inputs and outputs of every layer")
