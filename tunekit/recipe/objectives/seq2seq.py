"""`objective: seq2seq` supervised fine-tuning of encoder-decoders: one reads the prompt, one learns the answer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tunekit.recipe.bases.section import ObjectiveSettings


class Seq2seqSettings(ObjectiveSettings):
    """No settings of its own."""

    supervised: ClassVar[bool] = True
    family: ClassVar[str] = "seq2seq"

    method: Literal["seq2seq"] = Field("seq2seq", description="cross entropy on the answers of encoder-decoders")
