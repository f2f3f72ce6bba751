"""Losses of whole answers: each row has one loss, computed from the log-probabilities of its answers."""

from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain

import torch
from torch import Tensor

from tunekit.contracts import ROW_LOSSES, Array, Batch, Loss, LossKind, ModelOutput, Read, Row, RunView, Sums
from tunekit.machine.devices import summing_dtype
from tunekit.objectives.losses.logprobs import at_temperature, log_probabilities


class AnswerLoss(LossKind):
    """loss = sum over rows of `compared`, divided by the step's number of rows.

    `prepare` reads the whole step on all ranks to compute values that depend on several rows. So the loss does not
    depend on how the step is divided into micro-batches.
    """

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """The loss of each row, shape (P,), and the logged values, summed over rows."""
        raise NotImplementedError

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum of the rows' losses. Shapes: output.hidden (B, T, D) -> total (1,)."""
        losses, metrics = self.compared(output, batch)
        return Loss(losses.sum()[None], metrics=metrics)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums over rows: `loss`, `units` (the number of rows), and the logged values."""
        losses, metrics = self.compared(output, batch)
        wide = losses.to(summing_dtype(losses.device))
        return {"loss": wide.sum(), ROW_LOSSES: wide, "units": self.units(batch)[0], **metrics}


def predicted(output: ModelOutput, batch: Batch, temperature: float = 1.0, entropies: Tensor | None = None) -> Tensor:
    """The log-probability of each predicted token, shape (N,). If `entropies` (N,) is given, the function writes each
    token's entropy to it."""
    tempered = at_temperature(output, temperature)
    return log_probabilities(tempered, batch.targets["index"], batch.targets["ids"], entropies)


def by_sequence(values: Tensor, counts: Tensor) -> Tensor:
    """The sum of the values of each sequence, added in a fixed order, which is the same on every device.

    Shapes: values (N,), counts (S,) -> (S,).
    """
    return torch.stack([part.sum() for part in torch.split(values, counts.tolist())])


def by_row(scores: Tensor, sides: int) -> Array:
    """Reshape the scores of P rows with S answers each to one line per row. Shapes: (S P,) -> (P, S)."""
    return scores.numpy().reshape(sides, -1).T


def reference_scores(
    run: RunView, batches: Sequence[Batch], read: Read, *, keeps: str | bool, further: Sequence[Batch] = ()
) -> list[Tensor]:
    """The reference model's scores, shape (S P,) for S answers of P rows, for each of `batches`, then for each of
    `further`. Scores of `further` are not cached.

    `keeps`: whether each row's scores are cached. A row whose scores are cached is computed alone, so that its scores
    do not depend on the step. auto: cache only on a CPU (where this costs little time), and only if the run repeats its
    rows.
    """
    if keeps == "auto":
        keeps = run.model.repeats_rows and run.model.device.type == "cpu"
    if not keeps:
        return run.reference([*batches, *further], read)
    known = run.model.reference_scores
    keys = [[_key(row, run) for row in batch.rows] for batch in batches]
    rows = zip(chain.from_iterable(keys), chain.from_iterable(batch.rows for batch in batches), strict=True)
    new = {key: run.rows.collate([[row]]) for key, row in rows if key not in known}
    scores = run.reference([*new.values(), *further], read) if new or further else []
    known |= dict(zip(new, scores, strict=False))
    return [torch.stack([known[key] for key in some], dim=1).flatten() for some in keys] + scores[len(new) :]


def _key(row: Row, run: RunView) -> bytes:
    """A hash of the row's parts: rows with equal parts have equal scores."""
    return blake2b(b"".join(row.parts[name].tobytes() for name in run.rows.layout.parts), digest_size=16).digest()
