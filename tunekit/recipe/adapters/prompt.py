"""`adapter: {method: prompt}`: settings of prompt tuning (Lester et al. 2021)."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import Count, metamath_rate
from tunekit.recipe.bases.virtual_tokens import StartedTokenSettings


class PromptSettings(StartedTokenSettings):
    """Trained vectors before each row. The method needs a learning rate of 1e-3 and initial values from real tokens:
    PEFT's MetaMathQA comparison (Llama-3.2-3B, 200 vectors) measured .343 with both, and .057 with PEFT's defaults."""

    summary = "trained vectors before the embeddings of each row"
    default_learning_rate = metamath_rate(1e-3, "prompt_tuning/llama-3.2-3B-sample_vocab-lr_0.001")

    num_virtual_tokens: Count = Field(
        200, description="number of vectors (200 in PEFT's MetaMathQA comparison); data.max_length does not count them"
    )
    init: Literal["vocabulary", "random", "text"] = Field(
        "vocabulary",
        description="initial values. vocabulary: embeddings of random tokens; random: normal numbers; text: embeddings "
        "of a text",
    )
