"""Binary cross entropy of each label, for rows with any number of labels."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from tunekit.contracts import ROW_RIGHT, Batch, Loss, ModelOutput, Rows, RunView, Sums
from tunekit.formats.labels import MULTI_LABEL
from tunekit.machine.devices import for_sums
from tunekit.metrics.classes import class_table
from tunekit.objectives.losses.labels import LabelLoss
from tunekit.objectives.losses.row_sums import loss_sums, margin_sums

THRESHOLD = 0.5


@dataclass(frozen=True)
class MultiLabelLoss(LabelLoss):
    """The loss of a row is the mean of -y log p - (1 - y) log(1 - p) over the labels, where p = sigmoid(score). The
    step's sum is divided by the number of rows, as in transformers.

    A label is predicted if its probability is at least its threshold: `thresholds` (C,), or 0.5. `fits`: each
    evaluation first chooses the thresholds on all its rows.
    """

    metrics: Sequence[str] = ("loss", "micro_f1", "macro_f1")
    problem_type: str | None = MULTI_LABEL
    thresholds: tuple[float, ...] = ()
    fits: bool = False

    @property
    def measured_facts(self) -> Mapping[str, Any]:
        """The thresholds, if they are not 0.5."""
        return {"thresholds": list(self.thresholds)} if self.thresholds else {}

    @property
    def notes(self) -> Sequence[str]:
        """A note: F1 on the evaluation rows is too optimistic, because the thresholds are chosen on these rows."""
        chosen = "label thresholds are chosen on these evaluation rows, so expect a lower F1 on other rows"
        return (chosen,) if self.fits else ()

    def measuring(self, run: RunView, rows: Rows, batches: Iterable[Batch]) -> Self:
        """The loss. If `fits` is set, a copy with the thresholds that give the best F1 on all evaluation rows."""
        if not self.fits:
            return self

        def read(output: ModelOutput, batch: Batch) -> Tensor:
            scores, labels = self.scores(output, batch)
            return torch.cat([scores, labels], dim=-1).T.flatten()  # (2 C R,)

        mine = list[list[float]]()
        for batch in batches:
            mine += run.score([batch], read)[0].view(2 * len(self.labels), -1).T.tolist()
        scores, true = torch.tensor(run.gather(mine), dtype=torch.float64).chunk(2, dim=-1)  # (R, C) each
        pairs = zip(torch.sigmoid(scores).T, true.T, strict=True)
        return replace(self, thresholds=tuple(best_threshold(*pair) for pair in pairs))

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum of the rows' losses; `total` has the shape (1,)."""
        return Loss(_row_losses(*self.scores(output, batch)).sum()[None])

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums of a batch: `loss`, `units`; `label_counts` (C, 3): for each label, the number of rows predicted
        right, predicted, and labelled; `labelled` (2,): the number of rows with all labels right, and of all rows."""
        scores, labels = self.scores(output, batch)
        predicted, true = for_sums(self.predicted(scores)), for_sums(labels)  # (R, C) each
        counts = torch.stack([predicted * true, predicted, true]).sum(dim=1).T  # (C, 3)
        exact = for_sums((predicted == true).all(dim=-1))  # (R,)
        units = torch.tensor(float(len(labels)), dtype=torch.float64)
        labelled = torch.stack([exact.sum(), units.to(exact)])
        losses, margins = _row_losses(scores, labels), torch.where(labels > 0, scores, -scores).amin(dim=-1)  # (R,)
        return {
            **loss_sums(losses, batch),
            **margin_sums(margins, batch),
            "units": units,
            "label_counts": counts,
            "labelled": labelled,
            ROW_RIGHT: exact,
        }

    def predicted(self, scores: Tensor) -> Tensor:
        """For each row and label, whether the label is predicted. Shapes: scores (R, C) -> (R, C) bool."""
        probabilities = torch.sigmoid(for_sums(scores))  # (R, C); in float32, probabilities near 1 would be equal
        return probabilities >= probabilities.new_tensor(self.thresholds or THRESHOLD)  # (C,) or ()

    def class_counts(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """The table of counts for each label."""
        return {**class_table(self.labels, sums["label_counts"]), **self.measured_facts}

    def answers(self, scores: Tensor) -> list[str]:
        """The predicted labels of each row, as a JSON list."""
        rows = self.predicted(scores).tolist()
        named = ([name for name, there in zip(self.labels, row, strict=True) if there] for row in rows)
        return [json.dumps(names, ensure_ascii=False) for names in named]


def best_threshold(probabilities: Tensor, true: Tensor) -> float:
    """The threshold with the best F1, half-way between two probabilities; 0.5 if no other threshold is better.

    Shapes: (R,) each.
    """
    order = probabilities.argsort(descending=True)
    ranked = probabilities[order]
    right = true[order].cumsum(dim=0)  # (R,) how many of the first rows have the label
    scores = 2 * right / (torch.arange(1, len(ranked) + 1) + true.sum())  # F1 with the first rows predicted
    below = torch.cat([ranked[1:], torch.zeros(1, dtype=ranked.dtype)])  # (R,)
    scores = torch.where(ranked > below, scores, 0.0)  # equal probabilities are predicted together
    usual = 2 * true[probabilities >= THRESHOLD].sum() / ((probabilities >= THRESHOLD).sum() + true.sum()).clamp(min=1)
    best = int(scores.argmax())
    return THRESHOLD if scores[best] <= usual else float((ranked[best] + below[best]) / 2)


def _row_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row. Shapes: (R, C) each -> (R,)."""
    return torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(dim=-1)
