"""Scores of labels go in; out come the sums that accuracy, F1 and calibration are made of."""

import torch
from torch import Tensor

from tunekit.contracts import Sums
from tunekit.machine.devices import for_sums
from tunekit.metrics.expected_calibration_error import BINS

MOST_CONFUSED = 1000  # labels of a confusion matrix, which grows with their square


def label_sums(scores: Tensor, labels: Tensor) -> Sums:
    """correct, units; labelled (2,): right rows, and rows; label_counts (C, 3): rows of each label predicted right,
    predicted, and labelled; confusion (C, C), where labels are not too many: rows are true labels, columns predicted
    ones; calibration (bins, 3): of each bin of the largest probability its rows, the sum of those probabilities, and
    how many rows are right.

    Shapes: scores (R, C), whose softmax is each label's probability; labels (R,).
    """
    confidence, chosen = torch.softmax(for_sums(scores), dim=-1).max(dim=-1)  # (R,) each
    true, predicted = (for_sums(torch.nn.functional.one_hot(each, scores.shape[1])) for each in (labels, chosen))
    right = for_sums(chosen == labels)  # (R,)
    places = (confidence * BINS).ceil().clamp(1, BINS).long() - 1  # (R,)
    counted = torch.stack([torch.ones_like(right), confidence, right], dim=1)  # (R, 3)
    bins = for_sums(torch.nn.functional.one_hot(places, BINS)).T @ counted  # (bins, 3)
    units = torch.tensor(float(len(labels)), dtype=torch.float64)
    counts = torch.stack([true * predicted, predicted, true]).sum(dim=1).T  # (C, 3)
    sums = {"correct": right.sum(), "units": units, "label_counts": counts, "calibration": bins}
    confusion = {"confusion": true.T @ predicted} if scores.shape[1] <= MOST_CONFUSED else {}
    return {**sums, "labelled": torch.stack([right.sum(), units.to(right)]), **confusion}
