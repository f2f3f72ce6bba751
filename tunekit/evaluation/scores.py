"""Computes the sums of an objective over evaluation batches. The model and the random state are not changed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib import import_module
from itertools import islice
from typing import Any

import torch

from tunekit.contracts import ROW_LOSSES, ROW_MARGINS, ROW_RIGHT, Batch, ModelOutput, Objective, StepBatches, Sums
from tunekit.errors import RewardError
from tunekit.machine.devices import Devices, forked_random
from tunekit.memory.splitting import compute_in_parts
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


def prepared(
    model: TunedModel, objective: Objective, batch: Batch, on_split: Callable[[str], None] = lambda size: None
) -> Batch:
    """The batch after the objective has prepared it, in the same way as the batches of a training step."""
    run = ModelRun(model, objective.rows, on_split=on_split)
    return objective.prepare_step(run, StepBatches(0, 0.0, (0,), (batch,))).batches[0]


def summed_evaluation(
    model: TunedModel,
    objective: Objective,
    batches: Iterable[Batch],
    devices: Devices,
    stop: Callable[[], bool] = lambda: False,
    on_split: Callable[[str], None] = lambda size: None,
) -> EvaluationSums:
    """The sums of all batches. The batches are divided among the ranks.

    Sums are in float64, so the batch size changes them only by the rounding errors of a forward.
    `on_split`: called with the size of each batch that ran out of memory and is evaluated in two halves.
    Raises: EvaluationStopped if `stop` returns true on any rank; ResourceError if a single document does not fit into
    memory; RewardError, on all ranks, if a reward function returned an invalid result on one rank.
    """
    sums: Sums = {}
    stopped, failed = False, None
    with undisturbed(model):
        for batch in islice(batches, devices.rank, None, devices.world):
            stopped = stopped or stop()
            if stopped:
                break
            try:
                sums = added(sums, _sums_in_parts(model, objective, batch, on_split))
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


def _sums_in_parts(model: TunedModel, objective: Objective, batch: Batch, on_split: Callable[[str], None]) -> Sums:
    """The sums of the batch. If its forward runs out of memory, the sum of its two halves."""

    def sums_of(batches: Sequence[Batch]) -> list[Sums]:
        return [_sums(model, objective, batch) for batch in batches]

    batch = prepared(model, objective, batch, on_split)
    return compute_in_parts([batch], sums_of, lambda _, halves: added(*halves), objective.rows, on_split)[0]


def _sums(model: TunedModel, objective: Objective, batch: Batch) -> Sums:
    """The sums of a prepared batch, with the counts of its tokens and rows."""
    output = model.output(batch.inputs) if objective.loss.reads_output else ModelOutput()
    sums = objective.loss.sums(output, batch)
    numbers = [row.number for row in batch.rows] if ROW_LOSSES in sums else []
    counted = {TOKENS: batch.tokens, ROWS: len(batch.rows), NUMBERS: numbers}
    counts = {name: torch.tensor(count, dtype=torch.float64) for name, count in counted.items()}
    return {name: value.cpu().double() for name, value in sums.items()} | counts
