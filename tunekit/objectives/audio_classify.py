"""`objective: audio_classify`: audio classification, one label for each recording."""

from tunekit.contracts import EncodeOptions, Facts, Objective
from tunekit.model.speech.features import AudioProcessor
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.labels import mean_scores
from tunekit.objectives.losses.problem_types import label_loss
from tunekit.objectives.rows.labelled_recordings import LabelledRecordings
from tunekit.objectives.rows.labels import given_labels, label_objective, settings_of_head
from tunekit.recipe.objectives.audio_classify import AudioClassifySettings


def make(settings: AudioClassifySettings, processor: AudioProcessor, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are recordings with labels; the loss depends on the head's problem type."""
    settings = settings_of_head(settings, facts)
    fingerprint = row_fingerprint(settings, processor)
    labels = given_labels(settings, facts, problem_type=settings.problem_type)
    rows = LabelledRecordings(
        settings, processor, fingerprint, options, draws=settings.apply_spec_augment, labels=labels
    )
    return label_objective(settings, rows, label_loss(settings, facts, mean_scores))
