"""Squared error, for rows with one number or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunekit.contracts import Batch, Loss, ModelOutput, Sums
from tunekit.formats.labels import REGRESSION
from tunekit.machine.devices import for_sums
from tunekit.metrics.outputs import ROW_VALUES, output_table
from tunekit.objectives.losses.labels import LabelLoss
from tunekit.objectives.losses.row_sums import loss_sums
from tunekit.objectives.rows.label_kinds import numbers_text


@dataclass(frozen=True)
class RegressionLoss(LabelLoss):
    """The loss of a row is the mean of (score - number)^2 over its numbers. The step's sum is divided by the number of
    rows, as in transformers."""

    metrics: Sequence[str] = ("loss", "pearson", "spearman")
    problem_type: str | None = REGRESSION

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum of the rows' losses; `total` has the shape (1,)."""
        return Loss(_row_losses(*self.scores(output, batch)).sum()[None])

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sum of losses, the number of units, and each row's scores and numbers (R, 2 C), from which
        correlations over all rows are computed."""
        scores, values = self.scores(output, batch)
        units = torch.tensor(float(len(values)), dtype=torch.float64)
        both = torch.cat([for_sums(scores), for_sums(values)], dim=-1)  # (R, 2 C)
        return {**loss_sums(_row_losses(scores, values), batch), "units": units, ROW_VALUES: both}

    def class_counts(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """The table of metrics for each number."""
        return {"per_class": output_table(self.labels, sums[ROW_VALUES])}

    def answers(self, scores: Tensor) -> list[str]:
        """The predicted numbers of each row, as text."""
        return [numbers_text(row) for row in scores.tolist()]


def _row_losses(scores: Tensor, values: Tensor) -> Tensor:
    """The loss of each row. Shapes: (R, C) each -> (R,)."""
    return torch.nn.functional.mse_loss(scores, values, reduction="none").mean(dim=-1)
