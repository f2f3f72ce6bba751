"""The influence of training rows on the evaluation rows, from the adapter's gradients at the run's checkpoints.

  influence(z) = sum over checkpoints of w cos(g(z), mean over evaluation rows e of g(e)),  w proportional to the
  learning rate

g is the gradient of a row's mean loss, projected to SIZE numbers. Sources: TracIn, Pruthi et al. 2020; cosines and
random projections, LESS, Xia et al. 2024. Each tensor's gradient is projected as soon as autograd has computed it, so a
streamed base is computed layer by layer, and whole gradients of several rows never exist.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunekit.contracts import Objective, Progress, Rows, Window, no_progress
from tunekit.evaluation.scores import prepared, undisturbed
from tunekit.memory.splitting import Splitting
from tunekit.model.call import seed_for
from tunekit.training.engines.streaming import make_engine
from tunekit.tuned.model import TunedModel

SIZE = 4096  # numbers of a projected gradient; the error of a cosine is about 1 / sqrt(SIZE)
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

    def add(self, name: str, gradient: Tensor, total: Tensor) -> None:
        """Add the projection of a tensor's gradient to `total` (SIZE,)."""
        values = gradient.detach().flatten().float() * self.signs[name]
        total.index_add_(0, self.places[name], values)


def make_projection(parameters: Mapping[str, nn.Parameter], seed: int) -> Projection:
    """The projection of these tensors. It depends only on the seed and the tensors' names and sizes."""
    places, signs = dict[str, Tensor](), dict[str, Tensor]()
    for name, parameter in parameters.items():
        generator, count = torch.Generator("cpu").manual_seed(seed_for("influence", seed, name)), parameter.numel()
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
    splitting, gradients = Splitting(), torch.zeros(len(rows), SIZE, device=model.device)
    engine = make_engine(0, model.slots, ROWS_AT_ONCE, splitting)

    def running() -> Tensor:
        assert splitting.running is not None
        return gradients[splitting.running.rows[0].number]

    with _projecting(model, projection, running):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, len(rows)))
            with undisturbed(model):
                batches = [prepared(model, objective, objective.rows.collate([[rows[number]]])) for number in numbers]
            units = [objective.loss.units(batch) for batch in batches]
            window = Window(0, 0.0, tuple(range(len(batches))), tuple(batches))
            with model.training_mode(False):
                engine.run_window(model, objective, window, torch.ones_like(units[0]), NO_PENALTY)
            for number, count in zip(numbers, units, strict=True):
                gradients[number] /= max(float(count[0]), 1e-12)
            progress("gradients of rows", numbers.stop, len(rows))
    return gradients.cpu().numpy()


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
