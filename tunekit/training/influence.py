"""The influence of training rows on the evaluation rows, from the adapter's gradients at the run's checkpoints.

  influence(z) = sum over checkpoints of w cos(g(z), mean over evaluation rows e of g(e)),  w proportional to the
  learning rate

g is the gradient of a row's mean loss, projected to SIZE numbers. Sources: TracIn, Pruthi et al. 2020; cosines and
random projections, LESS, Xia et al. 2024. Each tensor's gradient is projected as soon as autograd has computed it, so a
streamed base is computed layer by layer, and whole gradients of several rows never exist. Short rows share a forward
and a backward, if that gives the same gradients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunekit.contracts import Objective, Progress, Row, RowLayout, Rows, StepBatches, no_progress
from tunekit.errors import is_out_of_memory
from tunekit.evaluation.row_losses import unit_counts
from tunekit.evaluation.scores import prepared, undisturbed
from tunekit.memory.splitting import Splitting
from tunekit.model.call import seed_for
from tunekit.training.engine import StepWork
from tunekit.training.split_gradients import can_split, split_gradients
from tunekit.training.streaming import make_engine
from tunekit.tuned.model import TunedModel

SIZE = 4096  # numbers of a projected gradient; the error of a cosine is about 1 / sqrt(SIZE)
TOKENS_AT_ONCE = 512  # of short rows that share a forward; about as fast as more
CHECKED_ROWS, SAME = 2, 0.05  # rows that are also computed alone; their maximum relative difference
ROWS_AT_ONCE = 64  # rows of which a streamed base computes each layer before the next layer
NO_PENALTY = 10**12  # the divisor of loss terms that belong to a step and not to a row
Gradients = NDArray[np.float32]  # (rows, SIZE)


@dataclass(frozen=True, eq=False)
class Projection:
    """A random projection of gradients to SIZE numbers that keeps products in expectation: each value is added to one
    number, with a random sign. `places`, `signs`: for each tensor, (values,).
    Source: Weinberger et al. 2009, a sparse Johnson-Lindenstrauss transform."""

    places: Mapping[str, Tensor]
    signs: Mapping[str, Tensor]

    def add(self, name: str, gradients: Tensor, totals: Tensor) -> None:
        """Add the projections of a tensor's gradients for P rows to `totals` (P, SIZE)."""
        values = gradients.detach().float().reshape(len(totals), -1) * self.signs[name]  # (P, values)
        totals.scatter_add_(1, self.places[name].long().expand_as(values), values)


def make_projection(parameters: Mapping[str, nn.Parameter]) -> Projection:
    """The projection of these tensors. It depends only on their names and sizes."""
    places, signs = dict[str, Tensor](), dict[str, Tensor]()
    for name, parameter in parameters.items():
        generator, count = torch.Generator("cpu").manual_seed(seed_for("influence", 0, name)), parameter.numel()
        drawn = torch.randint(2 * SIZE, (count,), generator=generator, dtype=torch.int32)
        places[name] = (drawn // 2).to(parameter.device)
        signs[name] = (drawn % 2 * 2 - 1).to(parameter.device, torch.int8)
    return Projection(places, signs)


def row_gradients(
    model: TunedModel, objective: Objective, rows: Rows, projection: Projection, progress: Progress = no_progress
) -> Gradients:
    """The projected gradient of each row's mean loss, (rows, SIZE), without dropout.

    Raises: ResourceError if memory is too small for a single row.
    """
    gradients, done, splits = torch.zeros(len(rows), SIZE, device=model.device), 0, can_split(model)
    alone = partial(_one_by_one, model, objective, Splitting(), projection)
    for numbers in _short_together(rows, objective.rows.layout) if splits else _in_order(rows):
        some, together = [rows[number] for number in numbers], None
        if splits and len(some) > 1:
            together = _together(model, objective, projection, some)
            # some models mix rows, such as those with experts
            if not done and (together is None or not _agree(together, alone(some[:CHECKED_ROWS]))):
                splits, together = False, None
        gradients[list(numbers)] = alone(some) if together is None else together
        done += len(some)
        progress("gradients of rows", done, len(rows))
    units = torch.tensor(unit_counts(rows, objective), device=model.device).clamp(min=1e-12)
    return (gradients / units[:, None]).float().cpu().numpy()


def _in_order(rows: Rows) -> Iterator[Sequence[int]]:
    return (range(start, min(start + ROWS_AT_ONCE, len(rows))) for start in range(0, len(rows), ROWS_AT_ONCE))


def _short_together(rows: Rows, layout: RowLayout) -> Iterator[Sequence[int]]:
    """Groups of row numbers, shortest rows first. Padded to its longest row, a group has at most TOKENS_AT_ONCE tokens,
    frames and pixels, or is a single row."""
    group: list[int] = []
    padded = np.array([sum(layout.padded(sizes)) for sizes in rows.sizes.tolist()])
    for number in np.argsort(padded, kind="stable").tolist():
        if group and (len(group) + 1) * int(padded[number]) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(number)
    yield group


def _together(model: TunedModel, objective: Objective, projection: Projection, rows: Sequence[Row]) -> Tensor | None:
    """The projected gradients of the rows' summed losses, from one forward and backward, (P, SIZE). None if memory is
    too small."""
    totals = torch.zeros(len(rows), SIZE, device=model.device)
    try:
        split_gradients(model, objective, rows, partial(projection.add, totals=totals))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return totals


def _agree(together: Tensor, alone: Tensor) -> bool:
    """Whether gradients of rows are those of the first rows alone. Shapes: (P, SIZE), (CHECKED_ROWS, SIZE)."""
    return bool((together[: len(alone)] - alone).norm() <= SAME * alone.norm())


def _one_by_one(
    model: TunedModel, objective: Objective, splitting: Splitting, projection: Projection, rows: Sequence[Row]
) -> Tensor:
    """The projected gradients of the rows' summed losses, one row after the other, (P, SIZE)."""
    totals = torch.zeros(len(rows), SIZE, device=model.device)
    places = {row.number: place for place, row in enumerate(rows)}

    def running() -> Tensor:
        assert splitting.running is not None
        place = places[splitting.running.rows[0].number]
        return totals[place : place + 1]

    with undisturbed(model):
        batches = [prepared(model, objective, objective.rows.collate([[row]])) for row in rows]
    step = StepBatches(0, 0.0, tuple(range(len(batches))), tuple(batches))
    ones = torch.ones_like(objective.loss.units(batches[0]))
    with _projecting(model, projection, running), model.training_mode(False):
        work = StepWork(
            model, objective, step, ones, 0, NO_PENALTY, splitting=splitting, micro_batches_per_pass=ROWS_AT_ONCE
        )
        [result] = make_engine(model).run([work])
        result.checked()
    return totals


@contextmanager
def _projecting(model: TunedModel, projection: Projection, running: Callable[[], Tensor]) -> Iterator[None]:
    """A block in which each gradient of a trained tensor is projected, added to `running()`, and freed."""
    assert model.adapter is not None

    def take(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            projection.add(name, gradient, running())

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(take, name))  # type: ignore[no-untyped-call]
        for name, parameter in model.adapter.trained().items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def influence_of(gradients: Gradients, evaluation: Gradients) -> NDArray[np.float64]:
    """The cosine of each row's gradient with the mean gradient of the evaluation rows, (rows,). Shapes: (rows, SIZE),
    (evaluation rows, SIZE)."""
    aim = evaluation.mean(axis=0)
    products = gradients @ aim
    lengths = np.linalg.norm(gradients, axis=1) * np.linalg.norm(aim)
    return np.asarray(products / np.maximum(lengths, 1e-30), np.float64)


def state_weights(rates: Sequence[float]) -> NDArray[np.float64]:
    """The weight of each state, from its learning rate. If all rates are 0, the weights are equal."""
    weights = np.asarray(rates, np.float64)
    return weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))
