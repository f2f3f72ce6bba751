"""Evaluation that changes nothing: token-weighted sums over batches, and answers for text metrics.

A TunedModel and evaluation batches go in, metrics by name come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch

from tunekit.contracts import Batch, Objective
from tunekit.data.batching.split import split_batch
from tunekit.machine.devices import Devices
from tunekit.memory.splitting import collect_failed, document_too_large, first_line, is_out_of_memory
from tunekit.model.call import Call, calling
from tunekit.tuned.model import TunedModel

LOSS_METRICS = ("loss", "perplexity")  # always measured


class EvaluationStopped(Exception):
    """A stop signal came during an evaluation; it will be made again after the resume."""


@dataclass(frozen=True)
class LossSums:
    """Sums over all evaluation rows."""

    loss: float
    correct: int
    supervised_tokens: int
    tokens: int
    rows: int

    def metrics(self, names: Sequence[str] = LOSS_METRICS) -> dict[str, float]:
        """The named metrics of metrics/ that follow from the sums, all weighted by token."""
        sums = (self.loss, self.correct, self.supervised_tokens)
        return {name: import_module(f"tunekit.metrics.{name}").from_sums(*sums) for name in names}


@contextmanager
def undisturbed(model: TunedModel) -> Iterator[None]:
    """Eval mode, no gradient; mode and every random state as before when the block ends."""
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), model.training_mode(False), calling(Call()):
        yield


def summed_evaluation(
    model: TunedModel,
    objective: Objective,
    batches: Iterable[Batch],
    devices: Devices,
    stop: Callable[[], bool] = lambda: False,
    on_split: Callable[[Batch], None] = lambda batch: None,
) -> LossSums:
    """Loss sums of all batches, shared among the ranks.

    Sums are token-weighted and in float64, so they do not depend on the batch size beyond a forward's own rounding.
    `on_split`: told of each batch that ran out of memory and is evaluated in two halves.
    Raises: EvaluationStopped where `stop` says so on any rank; ResourceError where a single document does not fit.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    stopped = False
    with undisturbed(model):
        for number, batch in enumerate(batches):
            if number % devices.world != devices.rank:
                continue
            stopped = stopped or stop()
            if stopped:
                break
            sums += _sums_or_halves(model, objective, batch, on_split)
    if devices.any(int(stopped)):
        raise EvaluationStopped
    total, correct, supervised, tokens, count = devices.sum(sums).tolist()
    return LossSums(total, int(correct), int(supervised), int(tokens), int(count))


def _sums_or_halves(
    model: TunedModel, objective: Objective, batch: Batch, on_split: Callable[[Batch], None]
) -> torch.Tensor:
    """(5,) float64: the batch's sums; those of its halves, added, where it runs out of memory."""
    try:
        return _sums(model, objective, batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Not inside `except`: there the error still holds the failed attempt's tensors.
    halves = split_batch(batch)
    if halves is None:
        raise document_too_large(batch, reason)
    on_split(batch)
    collect_failed()
    first, second = (_sums_or_halves(model, objective, half, on_split) for half in halves)
    return first + second


def _sums(model: TunedModel, objective: Objective, batch: Batch) -> torch.Tensor:
    """(5,) float64: loss, correct and supervised tokens, all tokens, rows."""
    hidden = model.hidden(objective.inputs(batch))
    loss = objective.loss(hidden, model.head(), batch)
    rows = sum(len(ids) for ids in batch.row_ids)
    counts = [float(loss.total.sum()), loss.metrics["correct"], float(objective.units(batch)), batch.tokens, rows]
    return torch.tensor(counts, dtype=torch.float64)
