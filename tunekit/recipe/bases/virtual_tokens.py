"""Settings shared by the methods with virtual tokens before each row. A method's file adds its further settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import AdapterSettings, Count, CountOrZero, Several, Text

NUM_VIRTUAL_TOKENS = Field(20, description="the number of virtual tokens, in addition to data.max_length")
NUM_TRANSFORMER_SUBMODULES: Literal[1, 2] = Field(
    1, description="2: the adapter file of an encoder-decoder has separate vectors for the encoder and the decoder"
)
MODULES_TO_SAVE = Field(
    (), description="modules that are trained completely, without an adapter, such as a head: names or name endings"
)


class StartedTokenSettings(AdapterSettings):
    """Trained vectors before each row. Their initial values can be the embeddings of real tokens."""

    merges = False

    num_virtual_tokens: Count = NUM_VIRTUAL_TOKENS
    num_transformer_submodules: Literal[1, 2] = NUM_TRANSFORMER_SUBMODULES
    modules_to_save: Several[Text] = MODULES_TO_SAVE
    init: str = "vocabulary"
    init_text: Text | None = Field(None, description="the text for init: text; repeated or cut to num_virtual_tokens")
    init_ids: Several[CountOrZero] | None = Field(None, description="for init: text: token ids instead of init_text")

    @model_validator(mode="after")
    def _text_or_not(self) -> StartedTokenSettings:
        texts = [name for name in ("init_text", "init_ids") if getattr(self, name) is not None]
        if self.init == "text" and not texts:
            raise ValueError("init: text needs init_text")
        if self.init != "text" and texts:
            raise ValueError(f"{texts[0]} needs init: text")
        if self.init_ids is not None and not self.init_ids:
            raise ValueError("init_ids is empty; write token ids, or remove it")
        return self
