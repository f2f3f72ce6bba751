"""`adapter: {method: ia3}`: settings of IA3 (Liu et al. 2022)."""

from pydantic import Field

from tunekit.recipe.bases.section import TargetedSettings, TextOrTexts, metamath_rate


class Ia3Settings(TargetedSettings):
    """One trained number per output (or input) of each layer. It needs a learning rate of 5e-3: PEFT's MetaMathQA
    comparison (Llama-3.2-3B) measured .455 at that rate with all linear layers and the feed-forward block's inputs,
    and .311 at 1e-3 with two attention layers and one feed-forward layer."""

    summary = "a trained scale of each layer's outputs or inputs"
    default_learning_rate = metamath_rate(5e-3, "ia3/llama-3.2-3B-all-attn-5k-lr0.005")

    target_modules: TextOrTexts = Field(
        "all-linear",
        description="all-linear (as in the best IA3 run of PEFT's MetaMathQA comparison), names, or a "
        "regular expression",
    )
    feedforward_modules: TextOrTexts | None = Field(
        None,
        description="the target modules whose inputs are scaled instead of their outputs: name endings, or a "
        "regular expression",
    )
