"""`adapter: {method: llama_adapter}` settings of LLaMA-Adapter, PEFT's adaption prompt (Zhang et al. 2023)."""

from pydantic import Field

from tunekit.recipe.bases.section import AdapterSettings, Count, metamath_rate


class LlamaAdapterSettings(AdapterSettings):
    """Trained tokens to which the upper layers attend apart from all others, through a gate that starts closed. Wants a
    learning rate of 5e-3: PEFT's MetaMathQA comparison (Llama-3.2-3B, these defaults) measured .381 with it, against
    .212 at 5e-4."""

    summary = "trained tokens behind gates that start at 0"
    default_learning_rate = metamath_rate(5e-3, "adaptionprompt/llama-3.2-3B-lr_5e-3")

    adapter_len: Count = Field(100, description="trained tokens of each layer")
    adapter_layers: Count | None = Field(None, description="how many layers, from the top; all by default")
