"""The loss and the margin of each row, from the values of its units (tokens, labels)."""

import torch
from torch import Tensor

from tunekit.contracts import ROW_LOSSES, ROW_MARGINS, Batch, Sums
from tunekit.machine.devices import for_sums, summing_dtype

SMALLEST_LOSS = 1e-7  # limits the log-odds of a token, whose float32 loss can be 0


def loss_sums(losses: Tensor, batch: Batch) -> Sums:
    """The sum of all losses, and the sum of each row's losses (rows,), in float64 if the device has it. `losses`
    (N,): the loss of each supervised unit, in the order of the batch's rows."""
    wide = summing_dtype(losses.device)
    parts = torch.split(losses, [row.supervised for row in batch.rows])
    return {"loss": losses.sum(dtype=wide), ROW_LOSSES: torch.stack([part.sum(dtype=wide) for part in parts])}


def margin_sums(margins: Tensor, batch: Batch) -> Sums:
    """The lowest margin of each row's units, (rows,). `margins` (N,): of each supervised unit, in the order of the
    batch's rows; positive if the model prefers the row's own label. A row without units has the margin 0."""
    parts = torch.split(for_sums(margins), [row.supervised for row in batch.rows])
    return {ROW_MARGINS: torch.stack([part.min() if len(part) else part.sum() for part in parts])}


def label_margins(scores: Tensor, labels: Tensor) -> Tensor:
    """The score of each unit's label minus the highest other score. Shapes: scores (N, C), labels (N,) -> (N,).
    Source: Pleiss et al. 2020, eq. 1."""
    own = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(dim=-1)


def log_odds(losses: Tensor) -> Tensor:
    """log p - log(1 - p) of each token, where its loss is -log p. It is the margin to the log-sum-exp of all other
    tokens' scores. Shapes: (N,) -> (N,)."""
    losses = for_sums(losses).clamp(min=SMALLEST_LOSS)
    return -losses - torch.log(-torch.expm1(-losses))
