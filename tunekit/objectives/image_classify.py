"""`objective: image_classify`: image classification, one label for each image."""

from dataclasses import replace

from tunekit.contracts import EncodeOptions, Facts, Objective
from tunekit.model.families.image_classifier import PixelProcessor
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.problem_types import label_loss
from tunekit.objectives.rows.images import LabelledImages
from tunekit.objectives.rows.labels import given_labels, label_objective, settings_of_head
from tunekit.recipe.objectives.image_classify import ImageClassifySettings


def make(settings: ImageClassifySettings, processor: PixelProcessor, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are images with labels; the loss depends on the head's problem type. `facts`: values
    saved with a trained adapter, including the resolution."""
    settings = settings.model_copy(update={key: facts[key] for key in ("resolution",) if key in facts})
    if settings.resolution is not None:
        processor = replace(processor, side=settings.resolution)
    settings = settings_of_head(settings, facts)
    fingerprint = row_fingerprint(settings, processor)
    labels = given_labels(settings, facts, problem_type=settings.problem_type)
    rows = LabelledImages(settings, processor, fingerprint, options, labels, draws=settings.augments)
    resolution = {} if settings.resolution is None else {"resolution": settings.resolution}
    return label_objective(settings, rows, label_loss(settings, facts), processor, **resolution)
