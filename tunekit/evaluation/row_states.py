"""The loss, the margin and the hidden state of each row in one state of a trained model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import (
    Batch,
    LossKind,
    ModelOutput,
    Objective,
    Progress,
    Rows,
    RunView,
    StepBatches,
    Sums,
    no_progress,
)
from tunekit.data.batching.steps import evaluation_batches
from tunekit.evaluation.row_losses import unit_counts
from tunekit.evaluation.row_ranking import Numbers
from tunekit.evaluation.scores import summed_evaluation, undisturbed
from tunekit.machine.devices import Devices
from tunekit.tuned.model import ModelRun, TunedModel


@dataclass(frozen=True)
class RowValues:
    """Values of all rows in one state. `losses` (rows,): the mean over the row's units. `margins` (rows,): see
    ROW_MARGINS; empty if the loss has none. `hidden` (rows, D): the mean of the last hidden states; empty if lines of a
    batch do not belong to single rows."""

    losses: Numbers
    margins: Numbers
    hidden: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(frozen=True, eq=False)
class RowReader:
    """Measures rows with a model whose adapter changes between calls."""

    model: TunedModel
    objective: Objective
    devices: Devices
    rows: Rows
    batch_size: int
    progress: Progress = no_progress

    def read(self, *, before: bool = False) -> RowValues:
        """The values of all rows in the model's present state. `before`: in the state before training."""
        state = self.model.at_step_0() if before else nullcontext()
        with state, _last_layer(self.model) as last:
            objective = self.measured()
            reader = _HiddenReader(objective.loss, last)
            objective = replace(objective, loss=reader)
            sums = summed_evaluation(self.model, objective, self._counted(), self.devices)
        losses, margins = (_by_number(each, len(self.rows)) for each in (sums.row_losses, sums.row_margins))
        losses = losses / np.maximum(self.units, 1e-12)
        if len(reader.hidden) < len(self.rows):
            return RowValues(losses, margins)
        return RowValues(losses, margins, np.stack([reader.hidden[number] for number in range(len(self.rows))]))

    def finds_losses(self) -> bool:
        """Whether the loss is a sum over rows. One row shows it."""
        batches = evaluation_batches(self.rows, self.objective.rows, batch_size=1)
        sums = summed_evaluation(self.model, self.objective.evaluation_copy(), [next(batches)], self.devices)
        return bool(sums.row_losses)

    @cached_property
    def units(self) -> Numbers:
        """The number of units of each row, (rows,)."""
        return np.asarray(unit_counts(self.rows, self.objective), np.float64)

    def measured(self) -> Objective:
        """The objective, with the values that all rows decide together."""
        batches = partial(evaluation_batches, self.rows, self.objective.rows, batch_size=self.batch_size)
        copy = self.objective.evaluation_copy()
        with undisturbed(self.model):
            run = ModelRun(self.model, self.objective.rows, self.devices.gather)
            return replace(copy, loss=copy.loss.measuring(run, self.rows, batches()))

    def _counted(self) -> Iterator[Batch]:
        done = 0
        for batch in evaluation_batches(self.rows, self.objective.rows, batch_size=self.batch_size):
            yield batch
            done += len(batch.rows)
            self.progress("rows measured", done, len(self.rows))


class _HiddenReader(LossKind):
    """A loss that also stores the mean hidden state of each row. `last`: returns the last layer's output, for a model
    that returns only logits."""

    def __init__(self, loss: LossKind, last: Callable[[], Tensor | None]) -> None:
        self.loss_kind, self.last = loss, last
        self.hidden: dict[int, NDArray[np.float32]] = {}  # row number -> (D,)

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        return self.loss_kind.prepare_step(run, step, earlier)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        states = self.last() if output.hidden is None else output.hidden
        means = None if states is None else row_means(states, batch)
        if means is not None:
            self.hidden |= {row.number: mean for row, mean in zip(batch.rows, means, strict=True)}
        return self.loss_kind.sums(output, batch)


def row_means(hidden: Tensor, batch: Batch) -> NDArray[np.float32] | None:
    """The mean of each row's hidden states over its positions without padding. A row may have several lines, such as
    the two answers of a pair. None if lines do not belong to single rows.

    Shapes: hidden (S P, T, D) for S lines of each of P rows -> (P, D).
    """
    rows = batch.rows
    if hidden.dim() != 3 or len(rows) != len(batch.sequences) or hidden.shape[0] % len(rows):
        return None
    lines, mask, sizes = hidden.shape[0] // len(rows), batch.inputs.get("attention_mask"), [row.sizes for row in rows]
    if "decoder_input_ids" in batch.inputs:  # the states are the decoder's, but the mask is the encoder's
        mask, sizes = None, [each[-1:] for each in sizes]
    real = torch.ones(hidden.shape[:2], dtype=torch.bool)  # (S P, T)
    if mask is not None and mask.shape == hidden.shape[:2]:
        real = mask.cpu().bool()
    elif all(len(each) == lines for each in sizes):
        lengths = torch.tensor([each[line] for line in range(lines) for each in sizes])  # (S P,)
        real = torch.arange(hidden.shape[1])[None] < lengths[:, None]
    weights = real.to(hidden.device, torch.float32)[..., None]  # (S P, T, 1)
    means = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    owners = batch.targets.get("of_row", torch.arange(len(rows)).repeat(lines)).to(means.device)  # (S P,)
    sums = torch.zeros(len(rows), means.shape[1], device=means.device).index_add(0, owners, means)
    return (sums / lines).cpu().numpy()


@contextmanager
def _last_layer(model: TunedModel) -> Iterator[Callable[[], Tensor | None]]:
    """Yields a function that returns the last layer's output in the latest forward, without the positions of virtual
    tokens; None before the first one."""
    outputs: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs[:] = [output[0] if isinstance(output, tuple) else output]

    handle = model.base.family.layers(model.base.net)[-1][1].register_forward_hook(keep)
    try:
        yield lambda: model.real_positions(outputs[0]) if outputs else None
    finally:
        handle.remove()


def _by_number(values: dict[int, float], count: int) -> Numbers:
    """(rows,) the values of rows 0, 1, ...; empty if rows lack a value."""
    return np.array([values[number] for number in range(count)] if len(values) == count else [], np.float64)
