"""SpecAugment: settings shared by the objectives that train on recordings."""

from typing import ClassVar

from pydantic import Field

from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, ObjectiveSettings


class SpecAugmentSettings(ObjectiveSettings):
    """Settings of SpecAugment. The names and defaults are from transformers' configuration."""

    training_keys: ClassVar[tuple[str, ...]] = (
        *("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks"),
        *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
    )

    apply_spec_augment: bool = Field(
        False, description="mask random time spans and frequencies of each recording (SpecAugment)"
    )
    mask_time_prob: Fraction = Field(
        0.05, description="SpecAugment: the share of a recording's frames to mask (less if masks overlap)"
    )
    mask_time_length: Count = Field(10, description="SpecAugment: the length of a mask in frames")
    mask_time_min_masks: CountOrZero = Field(2, description="SpecAugment: the minimum number of masks in a recording")
    mask_feature_prob: Fraction = Field(
        0.0, description="SpecAugment: the share of the frequencies to mask (less if masks overlap)"
    )
    mask_feature_length: Count = Field(10, description="SpecAugment: the number of frequencies in a mask")
    mask_feature_min_masks: CountOrZero = Field(0, description="SpecAugment: the minimum number of frequency masks")
