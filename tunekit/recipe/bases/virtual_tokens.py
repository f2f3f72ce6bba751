"""Settings that the methods with virtual tokens before each row share; a method's own file adds what is its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import AdapterSettings, Count, CountOrZero, Several, Text

NUM_VIRTUAL_TOKENS = Field(20, description="how many; they come on top of data.max_length")
NUM_TRANSFORMER_SUBMODULES: Literal[1, 2] = Field(
    1, description="2: an encoder-decoder's file has vectors for both, of which PEFT uses what the method says"
)
MODULES_TO_SAVE = Field((), description="modules trained whole, such as a classifier's head: names or name endings")


class StartedTokenSettings(AdapterSettings):
    """Trained vectors before each row, which may start as embeddings of real tokens."""

    num_virtual_tokens: Count = NUM_VIRTUAL_TOKENS
    num_transformer_submodules: Literal[1, 2] = NUM_TRANSFORMER_SUBMODULES
    modules_to_save: Several[Text] = MODULES_TO_SAVE
    init: str = "vocabulary"
    init_text: Text | None = Field(None, description="for init: text; repeated or cut to num_virtual_tokens")
    init_ids: Several[CountOrZero] | None = Field(None, description="for init: text, token ids instead of init_text")

    @model_validator(mode="after")
    def _text_or_not(self) -> StartedTokenSettings:
        given = [name for name in ("init_text", "init_ids") if getattr(self, name) is not None]
        if self.init == "text" and not given:
            raise ValueError("init: text needs init_text")
        if self.init != "text" and given:
            raise ValueError(f"{given[0]} belongs to init: text")
        if self.init_ids is not None and not self.init_ids:
            raise ValueError("init_ids holds no token")
        return self
