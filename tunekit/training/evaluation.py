"""Evaluation that changes nothing: token-weighted sums over batches, and answers for text metrics.

Comes in: a TunedModel and evaluation batches.  Goes out: metrics by name.  Next: loop.py, evaluate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch

from tunekit.model.call import Call, calling
from tunekit.protocols import Batch, Objective
from tunekit.training.devices import Devices
from tunekit.training.tuned import TunedModel

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
) -> LossSums:
    """Loss sums of all batches, shared among the ranks.

    Sums are token-weighted and in float64, so they do not depend on the batch size beyond a forward's own rounding.
    Raises: EvaluationStopped where `stop` says so on any rank.
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
            hidden = model.hidden(objective.inputs(batch))
            loss = objective.loss(hidden, model.head(), batch)
            rows = sum(len(ids) for ids in batch.row_ids)
            sums += torch.tensor(
                [float(loss.total.sum()), loss.metrics["correct"], float(objective.units(batch)), batch.tokens, rows],
                dtype=torch.float64,
            )
    if devices.any(int(stopped)):
        raise EvaluationStopped
    total, correct, supervised, tokens, count = devices.sum(sums).tolist()
    return LossSums(total, int(correct), int(supervised), int(tokens), int(count))
