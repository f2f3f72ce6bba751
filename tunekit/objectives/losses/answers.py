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

    `prepare` computes values that depend on several rows, for the whole step on all ranks. So micro-batches and splits
    do not change the loss.
    """

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """(P,) the loss of each row, and the logged values, summed over rows."""
        raise NotImplementedError

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, T, D) -> total (1,)."""
        losses, metrics = self.compared(output, batch)
        return Loss(losses.sum()[None], metrics=metrics)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums over rows: loss, units and the logged values."""
        losses, metrics = self.compared(output, batch)
        wide = losses.to(summing_dtype(losses.device))
        return {"loss": wide.sum(), ROW_LOSSES: wide, "units": self.units(batch)[0], **metrics}


def predicted(output: ModelOutput, batch: Batch, temperature: float = 1.0, entropies: Tensor | None = None) -> Tensor:
    """(N,) log-probability of every predicted token; `entropies` (N,) is filled with the entropies of the
    distributions."""
    tempered = at_temperature(output, temperature)
    return log_probabilities(tempered, batch.targets["index"], batch.targets["ids"], entropies)


def by_sequence(values: Tensor, counts: Tensor) -> Tensor:
    """The sum of the values of each sequence, added in a fixed order on every device.

    Shapes: values (N,), counts (S,) -> (S,).
    """
    return torch.stack([part.sum() for part in torch.split(values, counts.tolist())])


def by_row(scores: Tensor, sides: int) -> Array:
    """The scores, arranged by row. Shapes: (S P,) -> (P, S)."""
    return scores.numpy().reshape(sides, -1).T


def reference_scores(
    run: RunView, batches: Sequence[Batch], read: Read, *, keeps: str | bool, further: Sequence[Batch] = ()
) -> list[Tensor]:
    """The reference's scores (S P,) of each batch, then of each `further` batch. Scores of `further` are not cached.

    `keeps`: whether the scores of rows are cached. If so, each row is scored separately, so that its scores do not
    depend on the step. auto: only on a CPU, where this costs little time, and only if the run repeats its rows.
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
    """A key that is equal for rows with the same scores."""
    return blake2b(b"".join(row.parts[name].tobytes() for name in run.rows.layout.parts), digest_size=16).digest()
