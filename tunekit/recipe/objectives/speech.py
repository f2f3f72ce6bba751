"""`objective: speech`: speech recognition, or translation of speech, with an encoder-decoder such as Whisper."""

from typing import Literal

from pydantic import Field

from tunekit.basics import Shows
from tunekit.recipe.bases.section import Text
from tunekit.recipe.bases.spec_augment_settings import SpecAugmentSettings


class SpeechSettings(SpecAugmentSettings):
    """Settings of speech recognition: language and task of the transcripts, and timestamps."""

    summary = "cross entropy on the transcripts of recordings"
    family = "speech"
    example = "transcript"
    supervised = True
    shows = Shows(size_unit="frames and token")
    medium = "audio"
    first_order = 10
    first_lines = (("  language: english", "language of all rows; remove this line for an English-only model (.en)"),)

    language: Text | None = Field(
        None,
        description="the language of rows that name no language, such as english or en; required by multilingual "
        "models",
    )
    task: Literal["transcribe", "translate"] = Field(
        "transcribe", description="the task of rows that name no task; translate: write the text in English"
    )
    timestamps: bool = Field(False, description="train on timestamps and generate them; rows then need segments")
