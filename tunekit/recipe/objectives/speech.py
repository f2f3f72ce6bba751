"""`objective: speech` transcripts or translations of sounds, by an encoder-decoder such as Whisper."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tunekit.recipe.section import Count, CountOrZero, Fraction, ObjectiveSettings, Text


class SpeechSettings(ObjectiveSettings):
    """SpecAugment's keys bear the names of transformers' configuration, and its defaults."""

    family: ClassVar[str] = "speech"
    example: ClassVar[str] = "transcript"
    supervised: ClassVar[bool] = True
    size_unit: ClassVar[str] = "frames and token"

    method: Literal["speech"] = Field("speech", description="cross entropy on the transcripts of sounds")
    language: Text | None = Field(
        None, description="of every row without its own: a name or a code, such as en; needed by multilingual models"
    )
    task: Literal["transcribe", "translate"] = Field(
        "transcribe", description="of every row without its own; translate: into English"
    )
    timestamps: bool = Field(False, description="train on and write timestamps; rows then need segments")
    apply_spec_augment: bool = Field(False, description="mask stretches of each sound anew in each step (SpecAugment)")
    mask_time_prob: Fraction = Field(0.05, description="SpecAugment: share of a sound's frames at which a mask begins")
    mask_time_length: Count = Field(10, description="SpecAugment: frames of a mask")
    mask_time_min_masks: CountOrZero = Field(2, description="SpecAugment: masks of a sound at least")
    mask_feature_prob: Fraction = Field(0.0, description="SpecAugment: the same of frequencies")
    mask_feature_length: Count = Field(10, description="SpecAugment: frequencies of a mask")
    mask_feature_min_masks: CountOrZero = Field(0, description="SpecAugment: masks of frequencies at least")
