"""Chooses the loss for the problem type of a head: one label, any number of labels, or numbers (regression)."""

from collections.abc import Mapping
from typing import Any

from tunekit.formats.labels import MULTI_LABEL, REGRESSION
from tunekit.objectives.losses.labels import LabelLoss, ReadScores, row_scores
from tunekit.objectives.losses.multi_label import MultiLabelLoss
from tunekit.objectives.losses.regression import RegressionLoss
from tunekit.recipe.bases.label_settings import HeadSettings


def label_loss(settings: HeadSettings, facts: Mapping[str, Any], scores: ReadScores = row_scores) -> LabelLoss:
    """The loss for the problem type in the settings. `facts`: values saved with a trained head; `scores`: see
    LabelLoss."""
    if settings.problem_type == REGRESSION:
        return RegressionLoss(scores)
    if settings.problem_type != MULTI_LABEL:
        return LabelLoss(scores)
    thresholds = tuple(map(float, facts.get("thresholds", ())))
    return MultiLabelLoss(scores, thresholds=thresholds, fits=settings.fit_thresholds and not thresholds)
