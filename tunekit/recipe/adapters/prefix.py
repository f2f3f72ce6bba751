"""`adapter: {method: prefix}` settings of prefix tuning (Li and Liang 2021)."""

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
    """Trained keys and values that every layer attends to before its own. Wants a learning rate of 5e-3: with that and
    50 tokens of a real prefix, PEFT's MetaMathQA comparison (Llama-3.2-3B) measured .416, against .186 from random
    values at 1e-3."""

    summary = "trained keys and values before those of every layer"
    default_learning_rate = metamath_rate(5e-3, "prefixtuning/llama-3.2-3B-tokens50-init_prefix-lr_0.005")

    num_virtual_tokens: Count = Field(50, description="length of the prefix (that comparison's best)")
    init: Literal["text", "random", "zero"] | None = Field(
        None,
        description="first values: the base's own keys and values of init_text (that comparison's best, the default), "
        "normal numbers (the default with a projection), or zeros",
    )
    init_text: Text | None = Field(
        None,
        description="a real prefix, best of the task at hand; repeated or cut to num_virtual_tokens; a general "
        "instruction where none is given",
    )
    init_ids: Several[CountOrZero] | None = Field(None, description="a real prefix as token ids, instead of init_text")
    prefix_projection: bool = Field(
        False, description="train a smaller matrix and two layers that make the prefix of it; files hold the prefix"
    )
    encoder_hidden_size: Count | None = Field(
        None, description="width between those layers; by default that of a layer's keys"
    )

    @model_validator(mode="after")
    def _settle(self) -> PrefixSettings:
        if self.prefix_projection and self.init == "text":
            raise ValueError(
                "nothing that prefix_projection trains gives the keys and values of a text; leave init out"
            )
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size belongs to prefix_projection: true")
        if self.init_ids is not None and not self.init_ids:
            raise ValueError("init_ids holds no token")
        return self

    @property
    def first_values(self) -> str:
        """The init that is meant."""
        return self.init or ("random" if self.prefix_projection else "text")

    @property
    def needs_base_first(self) -> bool:
        """A text's keys and values are the base's own."""
        return self.first_values == "text"
