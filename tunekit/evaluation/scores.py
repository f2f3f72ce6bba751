"""Computes the sums of an objective over evaluation batches. The model and the random state are not changed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tunekit.contracts import ROW_LOSSES, ROW_MARGINS, ROW_RIGHT, Batch, Objective, Read, RowKind, Sums, Window
from tunekit.data.batching.split import split_batch
from tunekit.errors import RewardError, is_out_of_memory
from tunekit.machine.devices import Devices, forked_random
from tunekit.memory.splitting import collect_failed, document_too_large, first_line
from tunekit.metrics.outputs import ROW_VALUES
from tunekit.model.call import calling, current_call
from tunekit.tuned.model import ModelRun, TunedModel

TOKENS, ROWS = "tokens of all rows", "rows"  # counts in addition to the objective's sums
NUMBERS = "row numbers"  # numbers of the rows of ROW_LOSSES
LAID_END_TO_END = (ROW_LOSSES, ROW_MARGINS, ROW_RIGHT, ROW_VALUES, NUMBERS)


class EvaluationStopped(Exception):
    """A stop signal came during an evaluation. When the run is resumed, the evaluation is repeated."""


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over all evaluation rows: the objective's sums, the number of rows and the number of tokens."""

    values: dict[str, Any]  # float64 numbers, or lists of them
    tokens: int
    rows: int
    row_losses: dict[int, float] = field(default_factory=dict)  # the row's number -> its loss, a sum over its units
    row_right: dict[int, float] = field(default_factory=dict)  # 1 where all labels are right; empty without labels
    row_margins: dict[int, float] = field(default_factory=dict)  # of ROW_MARGINS; empty without labels or tokens

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """The metrics with these names, computed from the sums."""
        return {name: import_module(f"tunekit.metrics.{name}").from_sums(self.values) for name in names}


@contextmanager
def undisturbed(model: TunedModel) -> Iterator[None]:
    """A context manager that sets the model to eval mode and disables gradients. At its end, the mode and all random
    states are restored."""
    call = replace(current_call(), fuses=True)  # a caller may have bypassed the adapter
    with forked_random(model.device), torch.no_grad(), model.training_mode(False), calling(call):
        yield


def prepared(model: TunedModel, objective: Objective, batch: Batch) -> Batch:
    """The batch after the objective has prepared it, in the same way as the batches of a training step."""
    return objective.prepare_step(ModelRun(model, objective.rows), Window(0, 0.0, (0,), (batch,))).batches[0]


def summed_evaluation(
    model: TunedModel,
    objective: Objective,
    batches: Iterable[Batch],
    devices: Devices,
    stop: Callable[[], bool] = lambda: False,
    on_split: Callable[[Batch], None] = lambda batch: None,
) -> EvaluationSums:
    """The sums of all batches. The batches are divided among the ranks.

    Sums are in float64, so the batch size changes them only by the rounding errors of a forward.
    `on_split`: called for each batch that ran out of memory and is evaluated in two halves.
    Raises: EvaluationStopped if `stop` returns true on any rank; ResourceError if a single document does not fit into
    memory; RewardError, on all ranks, if a reward function returned an invalid result on one rank.
    """
    sums: Sums = {}
    stopped, failed = False, None
    with undisturbed(model):
        for batch, counts in devices.rounds(batches):
            stopped = stopped or stop()
            if stopped:
                break
            try:
                measured = _sums_or_halves(model, objective, batch, on_split)
                sums = added(sums, measured) if counts else sums
            except RewardError as error:  # the user's code failed; the other ranks do not know it yet
                failed = error
                break
    if devices.any(int(stopped)):
        raise EvaluationStopped
    total: Sums = {}
    for each, error_there in devices.gather([(sums, failed)]):
        if error_there is not None:
            raise error_there
        total = added(total, each)
    values: dict[str, Any] = {name: value.tolist() for name, value in total.items()}
    numbers, right = [int(number) for number in values.pop(NUMBERS, ())], values.pop(ROW_RIGHT, ())
    losses, margins = (dict(zip(numbers, values.pop(name, ()), strict=False)) for name in (ROW_LOSSES, ROW_MARGINS))
    labelled = len(right) == len(numbers)  # else labels are of words
    tokens, rows = int(values.pop(TOKENS, 0)), int(values.pop(ROWS, 0))
    of_right = dict(zip(numbers, right, strict=True)) if labelled else {}
    return EvaluationSums(values, tokens, rows, losses, of_right, margins)


def all_together(parts: Sequence[EvaluationSums]) -> EvaluationSums:
    """The sums over several sets of rows, added together."""
    first = parts[0]
    if len(parts) == 1:
        return first
    each = [{name: torch.tensor(value, dtype=torch.float64) for name, value in one.values.items()} for one in parts]
    total: Sums = reduce(added, each)
    losses = {number: loss for one in parts for number, loss in one.row_losses.items()}
    right = {number: value for one in parts for number, value in one.row_right.items()}
    margins = {number: value for one in parts for number, value in one.row_margins.items()}
    values = {name: value.tolist() for name, value in total.items()}
    return EvaluationSums(
        values, sum(one.tokens for one in parts), sum(one.rows for one in parts), losses, right, margins
    )


def added(one: Sums, other: Sums) -> Sums:
    """The sums over two sets of batches, added together. Either set may be empty."""
    if not (one and other):
        return one or other
    return {
        name: torch.cat([value, other[name]]) if name in LAID_END_TO_END else value + other[name]
        for name, value in one.items()
    }


def _sums_or_halves(model: TunedModel, objective: Objective, batch: Batch, on_split: Callable[[Batch], None]) -> Sums:
    """The sums of the batch. If the batch runs out of memory, the sum of its two halves."""
    try:
        batch = prepared(model, objective, batch)
        sums = objective.loss.sums(model.output(batch.inputs), batch)
        numbers = [row.number for row in batch.rows] if ROW_LOSSES in sums else []
        counted = {TOKENS: batch.tokens, ROWS: len(batch.rows), NUMBERS: numbers}
        counts = {name: torch.tensor(count, dtype=torch.float64) for name, count in counted.items()}
        return {name: value.cpu().double() for name, value in sums.items()} | counts
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Not inside `except`: there the error still holds the failed attempt's tensors.
    halves = _halves(batch, objective.rows, reason, on_split)
    first, second = (_sums_or_halves(model, objective, half, on_split) for half in halves)
    return added(first, second)


def _halves(batch: Batch, rows: RowKind, reason: str, on_split: Callable[[Batch], None]) -> tuple[Batch, Batch]:
    """The two halves of a batch that ran out of memory. Raises: ResourceError if the batch is a single document."""
    halves = split_batch(batch, rows)
    if halves is None:
        raise document_too_large(batch, reason)
    on_split(batch)
    collect_failed()
    return halves


@dataclass
class MeasuringRun(ModelRun):
    """A ModelRun that is passed to LossKind.measuring. If a batch runs out of memory, it is scored in two halves.
    `read` returns S numbers for each of P rows, in this order: the first number of every row, the second number of
    every row, and so on."""

    on_split: Callable[[Batch], None] = lambda batch: None

    def score(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """The policy's scores, as in ModelRun."""
        return [self._in_halves(batch, read, reference=False) for batch in batches]

    def reference(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """The scores of the reference (the policy at step 0), as in ModelRun."""
        return [self._in_halves(batch, read, reference=True) for batch in batches]

    def _in_halves(self, batch: Batch, read: Read, *, reference: bool) -> Tensor:
        """The values that `read` returns for a batch; if the batch runs out of memory, for its two halves, joined.
        Shape (S P,): S values of P rows."""
        try:
            return self.model.score_batches([batch], read, reference=reference)[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        halves = _halves(batch, self.rows, reason, self.on_split)
        scores = [self._in_halves(half, read, reference=reference).view(-1, len(half.rows)) for half in halves]
        return torch.cat(scores, dim=1).flatten()  # (S P,)
