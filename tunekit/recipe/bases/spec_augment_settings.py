"""What objectives over recordings share: SpecAugment."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, CountOrZero, Fraction, ObjectiveSettings


class SpecAugmentSettings(ObjectiveSettings):
    """The keys bear the names of transformers' configuration, and its defaults."""

    apply_spec_augment: bool = Field(
        False, description="mask stretches of each recording anew in each step (SpecAugment)"
    )
    mask_time_prob: Fraction = Field(
        0.05, description="SpecAugment: share of a recording's frames at which a mask begins"
    )
    mask_time_length: Count = Field(10, description="SpecAugment: frames of a mask")
    mask_time_min_masks: CountOrZero = Field(2, description="SpecAugment: masks of a recording at least")
    mask_feature_prob: Fraction = Field(0.0, description="SpecAugment: the same of frequencies")
    mask_feature_length: Count = Field(10, description="SpecAugment: frequencies of a mask")
    mask_feature_min_masks: CountOrZero = Field(0, description="SpecAugment: masks of frequencies at least")
