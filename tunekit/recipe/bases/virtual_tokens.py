"""Settings that the methods with virtual tokens before each row share; a method's own file adds what is its own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tunekit.recipe.bases.section import AdapterSettings, Count, Several, Text


class VirtualTokenSettings(AdapterSettings):
    """Trained vectors that stand before each row, where its tokens' embeddings stand."""

    num_virtual_tokens: Count = Field(20, description="how many; they come on top of data.max_length")
    num_transformer_submodules: Literal[1, 2] = Field(
        1, description="2: an encoder-decoder's file has vectors for both, of which PEFT uses what the method says"
    )
    modules_to_save: Several[Text] = Field(
        (), description="modules trained whole, such as a classifier's head: names or name endings"
    )


# Fields of the methods whose vectors themselves are trained and may start as embeddings of real tokens.
INIT_TEXT: Any = Field(None, description="for init: text; repeated or cut to num_virtual_tokens")
INIT_IDS: Any = Field(None, description="for init: text, token ids instead of init_text")


def check_first_tokens(settings: Any) -> Any:
    """Refuse init: text without a text, and a text with another init."""
    written = [name for name in ("init_text", "init_ids") if getattr(settings, name) is not None]
    if settings.init == "text" and not written:
        raise ValueError("init: text needs init_text")
    if settings.init != "text" and written:
        raise ValueError(f"{written[0]} belongs to init: text")
    if settings.init_ids is not None and not settings.init_ids:
        raise ValueError("init_ids holds no token")
    return settings
