"""`objective: seq2seq` supervised fine-tuning of encoder-decoders: one reads the prompt, one learns the answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import ObjectiveSettings


class Seq2seqSettings(ObjectiveSettings):
    """No settings of its own."""

    supervised = True
    family = "seq2seq"

    method: Literal["seq2seq"] = Field("seq2seq", description="cross entropy on the answers of encoder-decoders")
