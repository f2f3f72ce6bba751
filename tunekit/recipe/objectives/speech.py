"""`objective: speech` transcripts or translations of recordings, by an encoder-decoder such as Whisper."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.section import Text
from tunekit.recipe.bases.spec_augment_settings import SpecAugmentSettings
from tunekit.records import Shows


class SpeechSettings(SpecAugmentSettings):
    """What is said in a recording, in which language, and whether with times."""

    summary = "cross entropy on the transcripts of recordings"
    family = "speech"
    example = "transcript"
    supervised = True
    shows = Shows(size_unit="frames and token")
    medium = "audio"
    first_order = 10
    first_lines = (("  language: english", "of all rows; leave it out with a model of English alone (.en)"),)

    language: Text | None = Field(
        None, description="of every row without its own: a name or a code, such as en; needed by multilingual models"
    )
    task: Literal["transcribe", "translate"] = Field(
        "transcribe", description="of every row without its own; translate: into English"
    )
    timestamps: bool = Field(False, description="train on and write timestamps; rows then need segments")
