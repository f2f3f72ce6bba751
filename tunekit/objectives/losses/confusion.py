"""Sums for the accuracy, F1 and calibration of predicted labels."""

import torch
from torch import Tensor

from tunekit.contracts import ROW_RIGHT, Sums
from tunekit.machine.devices import for_sums
from tunekit.metrics.expected_calibration_error import BINS

MOST_CONFUSED = 1000  # maximum number of labels of a confusion matrix; its size is the square of this number


def label_sums(scores: Tensor, labels: Tensor) -> Sums:
    """The sums of a batch:

    - `correct`: the number of rows predicted right; `units`: the number of all rows
    - `labelled` (2,): the same two numbers
    - `label_counts` (C, 3): for each label, the number of rows predicted right, predicted, and labelled
    - `confusion` (C, C), unless there are too many labels: a line for each true label, a column for each predicted
      label
    - `calibration` (bins, 3): rows are divided into bins by their largest probability. For each bin: the number of its
      rows, the sum of their largest probabilities, and the number of right rows

    Shapes: scores (R, C), labels (R,). Probabilities are the softmax of the scores. A row whose probabilities are not
    finite is wrong, with the probability 0.
    """
    confidence, chosen = torch.softmax(for_sums(scores), dim=-1).max(dim=-1)  # (R,) each
    confidence = confidence.nan_to_num(0.0)
    true, predicted = (for_sums(torch.nn.functional.one_hot(each, scores.shape[1])) for each in (labels, chosen))
    right = for_sums((chosen == labels) & (confidence > 0))  # (R,)
    places = (confidence * BINS).ceil().clamp(1, BINS).long() - 1  # (R,)
    counted = torch.stack([torch.ones_like(right), confidence, right], dim=1)  # (R, 3)
    bins = for_sums(torch.nn.functional.one_hot(places, BINS)).T @ counted  # (bins, 3)
    units = torch.tensor(float(len(labels)), dtype=torch.float64)
    counts = torch.stack([true * predicted, predicted, true]).sum(dim=1).T  # (C, 3)
    sums = {"correct": right.sum(), "units": units, "label_counts": counts, "calibration": bins, ROW_RIGHT: right}
    confusion = {"confusion": true.T @ predicted} if scores.shape[1] <= MOST_CONFUSED else {}
    return {**sums, "labelled": torch.stack([right.sum(), units.to(right)]), **confusion}
