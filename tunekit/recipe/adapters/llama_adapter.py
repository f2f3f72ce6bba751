"""`adapter: {method: llama_adapter}`: settings of LLaMA-Adapter, PEFT's adaption prompt (Zhang et al. 2023)."""

from pydantic import Field

from tunekit.recipe.bases.section import AdapterSettings, Count, metamath_rate


class LlamaAdapterSettings(AdapterSettings):
    """Trained tokens to which the upper layers attend separately, through a gate that starts at 0. The method needs a
    learning rate of 5e-3: PEFT's MetaMathQA comparison (Llama-3.2-3B, these defaults) measured .381 at that rate, and
    .212 at 5e-4."""

    summary = "trained tokens behind gates that start at 0"
    merges = False
    default_learning_rate = metamath_rate(5e-3, "adaptionprompt/llama-3.2-3B-lr_5e-3")

    adapter_len: Count = Field(100, description="number of trained tokens of each layer")
    adapter_layers: Count | None = Field(
        None, description="number of layers with these tokens, counted from the top; by default all layers"
    )
