"""`objective: audio_classify`: audio classification. A head, trained with the adapter, predicts a label."""

from tunekit.basics import Shows
from tunekit.recipe.bases.label_settings import HeadSettings, LabelSettings
from tunekit.recipe.bases.spec_augment_settings import SpecAugmentSettings


class AudioClassifySettings(SpecAugmentSettings, HeadSettings, LabelSettings):
    """Settings of audio classification. Whisper's encoder predicts one label for each recording."""

    summary = "cross entropy on a label for each recording"
    family = "audio_classifier"
    example = "audio_label"
    shows = Shows(unit="label", size_unit="frame")
    medium = "audio"
    first_order = 20
    training_keys = (*SpecAugmentSettings.training_keys, *LabelSettings.training_keys)
