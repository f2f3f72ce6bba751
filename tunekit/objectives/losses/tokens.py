"""Cross entropy on supervised tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.contracts import IGNORED, Batch, Loss, LossKind, ModelOutput, Sums
from tunekit.objectives.losses.logprobs import loss_of_positions, sums_of_positions, supervised_positions

# (N,) positions in the flattened (B, T) that predict supervised tokens; these tokens; their weights, None if all are 1
Supervised = tuple[Tensor, Tensor, Tensor | None]


def next_tokens(batch: Batch) -> Supervised:
    """The supervised positions in a causal model. Labels are the inputs: position t predicts labels[t + 1]."""
    index, targets = supervised_positions(batch.targets["labels"])
    weights = batch.targets.get("weights")
    return index, targets, None if weights is None else weights.flatten()[index + 1]


def own_positions(batch: Batch) -> Supervised:
    """The supervised positions in a decoder, where position t predicts labels[t]."""
    labels, weights = batch.targets["labels"], batch.targets.get("weights")  # (B, A)
    rows, columns = torch.nonzero(labels != IGNORED, as_tuple=True)
    weight = None if weights is None else weights[rows, columns]
    return rows * labels.shape[1] + columns, labels[rows, columns], weight


@dataclass(frozen=True)
class TokenLoss(LossKind):
    """loss = sum over supervised tokens of -w log p(token | tokens before it); divided by the step's sum of w. w is
    the `weight` of a message times the `sample_weight` of the row, 1 by default."""

    supervised: Callable[[Batch], Supervised] = next_tokens
    metrics: Sequence[str] = ("loss", "perplexity")

    def units(self, batch: Batch) -> Tensor:
        """The sum of the supervised tokens' weights, shape (1,) float64."""
        weights = self.supervised(batch)[2] if "weights" in batch.targets else None
        return super().units(batch) if weights is None else weights.sum(dtype=torch.float64)[None]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum over tokens. Shapes: output.hidden (B, T, D) -> total (1,)."""
        return loss_of_positions(output, *self.supervised(batch))

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums over tokens: `loss`, `correct` (tokens predicted right) and `units` (all tokens). Tokens count with
        their weights."""
        return sums_of_positions(output, *self.supervised(batch), batch)
