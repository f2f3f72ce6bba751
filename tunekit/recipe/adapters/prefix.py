"""`adapter: {method: prefix}`: settings of prefix tuning (Li and Liang 2021)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import AdapterSettings, Count, CountOrZero, Several, Text, metamath_rate

INIT_TEXT = (
    "You are a helpful assistant. Read carefully what is asked of you, and find out what the task is. Then solve it "
    "in clear and logical steps. Say only what is true, keep to the form that is asked for, and check at the end that "
    "your answer makes sense."
)


class PrefixSettings(AdapterSettings):
    """Trained keys and values, placed before the keys and values of the tokens in every layer. The method needs a
    learning rate of 5e-3: PEFT's MetaMathQA comparison (Llama-3.2-3B) measured .416 at that rate, initialised from 50
    tokens of text, and .186 at 1e-3, initialised with random values."""

    summary = "trained keys and values before the tokens, in every layer"
    merges = False
    default_learning_rate = metamath_rate(5e-3, "prefixtuning/llama-3.2-3B-tokens50-init_prefix-lr_0.005")

    num_virtual_tokens: Count = Field(
        50, description="number of positions in the prefix (best in PEFT's MetaMathQA comparison)"
    )
    init: Literal["text", "random", "zero"] | None = Field(
        None,
        description="initial values. text: the base's keys and values of init_text (the default); random: normal "
        "numbers (the default with prefix_projection); zero: zeros",
    )
    init_text: Text | None = Field(
        None,
        description="a text for the initial values; a text about the task works best. It is repeated or truncated to "
        "num_virtual_tokens tokens; by default a general instruction",
    )
    init_ids: Several[CountOrZero] | None = Field(None, description="token ids instead of init_text")
    prefix_projection: bool = Field(
        False,
        description="train a smaller matrix and two layers that compute the prefix from this matrix; the adapter's "
        "file contains only the computed prefix",
    )
    encoder_hidden_size: Count | None = Field(
        None,
        description="with prefix_projection: the width between the two layers; by default the width of a layer's keys",
    )

    @model_validator(mode="after")
    def _settle(self) -> PrefixSettings:
        if self.prefix_projection and self.init == "text":
            raise ValueError("prefix_projection cannot be initialised from a text; remove init")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError(
                "encoder_hidden_size belongs to prefix_projection: true; add it, or remove encoder_hidden_size"
            )
        if self.init_ids is not None and not self.init_ids:
            raise ValueError("init_ids is empty; write token ids, or remove it")
        return self

    @property
    def first_values(self) -> str:
        """The value of `init`, or the default if the recipe has no `init`."""
        return self.init or ("random" if self.prefix_projection else "text")

    @property
    def needs_base_first(self) -> bool:
        """Whether the base must be loaded first: it computes the keys and values of a text."""
        return self.first_values == "text"
