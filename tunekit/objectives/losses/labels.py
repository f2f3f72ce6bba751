"""Cross entropy on labels: loss = sum over labels of -w(label) log p(label | row), divided by the sum of w(label).

w is 1 unless labels have weights."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from tunekit.contracts import Batch, Loss, LossKind, ModelOutput, Sums
from tunekit.machine.placing import to_device
from tunekit.metrics.classes import class_table
from tunekit.metrics.span_f1 import find_spans, kinds_of
from tunekit.objectives.losses.confusion import label_sums
from tunekit.objectives.losses.logprobs import logits_at
from tunekit.objectives.losses.row_sums import label_margins, loss_sums, margin_sums

ReadScores = Callable[[ModelOutput, Batch], tuple[Tensor, Tensor]]


def row_scores(output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores and labels of rows. The model returns a row's scores, or the head is applied to the row's `last` token. In
    the second case, rows can be packed.
    Shapes: output.logits (R, C), or output.hidden (B, T, D) -> scores (R, C), labels (R,)."""
    if output.logits is not None:
        return output.logits.float(), to_device(batch.targets["labels"], output.logits.device)
    scores = logits_at(output, batch.targets["last"])
    return scores, to_device(batch.targets["labels"], scores.device)


def mean_scores(output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores and labels of rows. The head is applied to the mean of a row's hidden states.
    Shapes: output.hidden (B, F, D) -> scores (B, C), labels (B,)."""
    assert output.hidden is not None
    assert output.head is not None
    mean = output.hidden.mean(dim=1)  # (B, D)
    return output.head.logits(mean), to_device(batch.targets["labels"], mean.device)


def word_scores(output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores and labels of words, at the first token of each word. Shapes: output.logits (B, T, C) -> scores (N, C),
    labels (N,)."""
    assert output.logits is not None
    firsts, labels = (to_device(batch.targets[name], output.logits.device) for name in ("firsts", "labels"))
    return output.logits.flatten(0, 1).index_select(0, firsts).float(), labels


@dataclass(frozen=True)
class LabelLoss(LossKind):
    """Cross entropy on labels. `scores`: a function that returns scores (N, C) float32 and label indices (N,), on the
    device. `problem_type`: transformers' name of this loss, which is saved in a merged model's configuration.
    `weights`: the weight of each label; if empty, every weight is 1. `smoothing`: the share of a target that is spread
    over all labels. Evaluation ignores weights and smoothing, so that its losses can be compared between runs."""

    scores: ReadScores = row_scores
    labels: tuple[str, ...] = ()
    metrics: Sequence[str] = ("loss", "accuracy", "macro_f1")
    problem_type: str | None = "single_label_classification"
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the user on how to interpret the metrics."""
        return ()

    def evaluation_copy(self) -> Self:
        """A copy of the loss without label weights and label smoothing."""
        return replace(self, weights=(), smoothing=0.0)

    def units(self, batch: Batch) -> Tensor:
        """The sum of the labels' weights."""
        if not self.weights:
            return super().units(batch)
        weights = torch.tensor(self.weights, dtype=torch.float64)  # (C,)
        return weights[batch.targets["labels"].cpu()].sum()[None]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum of the weighted losses; `total` has the shape (1,)."""
        scores, labels = self.scores(output, batch)
        weights = torch.tensor(self.weights, device=scores.device) if self.weights else None  # (C,)
        entropy, smoothing = torch.nn.functional.cross_entropy, self.smoothing
        return Loss(entropy(scores, labels, weights, reduction="sum", label_smoothing=smoothing)[None])

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums of the losses, and the sums that `label_sums` returns."""
        scores, labels = self.scores(output, batch)
        losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")  # (N,)
        margins = margin_sums(label_margins(scores, labels), batch)
        return {**loss_sums(losses, batch), **margins, **label_sums(scores, labels)}

    def class_counts(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """The table of counts for each label."""
        return class_table(self.labels, sums["label_counts"], sums.get("confusion"))

    def answers(self, scores: Tensor) -> list[str]:
        """The most likely label for each row of scores (N, C)."""
        return [self.labels[number] for number in scores.argmax(dim=-1).tolist()]


@dataclass(frozen=True)
class TagLoss(LabelLoss):
    """Cross entropy on the tags of words. Tags form spans, such as B-PER I-PER."""

    scores: ReadScores = word_scores
    metrics: Sequence[str] = ("loss", "token_accuracy", "span_f1")
    problem_type: str | None = None

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums of LabelLoss, and `spans` (kinds, 3): for each kind of span, the number of spans predicted right,
        predicted, and true."""
        scores, _ = self.scores(output, batch)
        kinds = kinds_of(self.labels)
        spans = torch.zeros(len(kinds), 3, dtype=torch.float64)
        if not scores.is_meta:
            numbers = [iter(each.tolist()) for each in (batch.targets["labels"], scores.argmax(dim=-1))]
            for row in batch.rows:
                tags = [[self.labels[next(each)] for _ in range(row.supervised)] for each in numbers]
                true, predicted = (set(find_spans(each)) for each in tags)
                for column, members in enumerate((predicted & true, predicted, true)):
                    for kind, count in Counter(kind for kind, _, _ in members).items():
                        spans[kinds.index(kind), column] += count
        return {**super().sums(output, batch), "spans": spans}

    def class_counts(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """The counts for each kind of span."""
        return {"labels": kinds_of(self.labels), "counts": [[int(count) for count in row] for row in sums["spans"]]}
