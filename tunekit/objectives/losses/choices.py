"""Scores the answers of a question: an answer's score is the sum of its tokens' log-probabilities."""

from dataclasses import dataclass

import torch

from tunekit.contracts import Batch, LossKind, ModelOutput, Sums
from tunekit.machine.devices import for_sums, summing_dtype
from tunekit.machine.placing import to_device
from tunekit.objectives.losses.logprobs import scores_of_positions


@dataclass(frozen=True)
class ChoiceLoss(LossKind):
    """Computes the scores of answers, for evaluation only. `shape`: the shape of the scores, (questions, answers)."""

    shape: tuple[int, int]

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """`scores` (questions, answers): the sum of each answer's log-probabilities. `hits` (questions, answers): how
        many tokens of each answer have the highest probability. Answers that are not in this batch have 0 in both
        arrays."""
        losses, correct = scores_of_positions(output, batch.targets["index"], batch.targets["labels"])  # (S,) each
        cells = to_device(batch.targets["cells"], losses.device)
        scores, hits = torch.zeros((2, *self.shape), dtype=summing_dtype(losses.device), device=losses.device)
        scores.view(-1).index_add_(0, cells, -for_sums(losses))
        hits.view(-1).index_add_(0, cells, correct.to(hits.dtype))
        return {"scores": scores, "hits": hits}
