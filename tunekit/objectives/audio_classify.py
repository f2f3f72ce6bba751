"""`objective: audio_classify`: audio classification, one label for each recording."""

from tunekit.contracts import EncodeOptions, Facts, Objective
from tunekit.model.speech.features import AudioProcessor
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.labels import LabelLoss, mean_scores
from tunekit.objectives.rows.labelled_recordings import LabelledRecordings
from tunekit.objectives.rows.labels import given_labels, label_objective
from tunekit.recipe.objectives.audio_classify import AudioClassifySettings


def make(settings: AudioClassifySettings, processor: AudioProcessor, facts: Facts, options: EncodeOptions) -> Objective:
    """Recordings with labels, and cross entropy."""
    labels, fingerprint = given_labels(settings, facts), row_fingerprint(settings, processor)
    rows = LabelledRecordings(
        settings, processor, fingerprint, options, draws=settings.apply_spec_augment, labels=labels
    )
    return label_objective(settings, rows, LabelLoss(mean_scores))
