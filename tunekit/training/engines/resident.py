"""The engine for a base whose weights are all on the device: one micro-batch after the other.

Comes in: a window and the step's units.  Goes out: the gradient of (sum of losses / units), in the flat buffers.
A micro-batch that runs out of memory is split (memory/splitting.py): the same sums, in another order.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from tunekit.contracts import Batch, Loss, Objective, Window
from tunekit.memory.splitting import PIECE_STRIDE, Splitting
from tunekit.model.call import AFTER_LAYERS, OUTSIDE_LAYERS, Call, calling, seed_layer
from tunekit.model.placing import placed
from tunekit.tuned.model import TunedModel


class ResidentEngine:
    """Forward and backward of each micro-batch; only one micro-batch's activations live at a time.

    `splitting`: what to do where memory runs out; None: that is an error.
    """

    def __init__(self, seed: int, splitting: Splitting | None = None) -> None:
        self.seed = seed
        self.splitting = splitting
        self.loss_scale = 1.0  # float16's; multiplies the loss before the backward pass
        self.losses: list[Tensor] = []  # of each micro-batch of the last window, on the device; names the rows of a NaN

    def run_window(
        self, model: TunedModel, objective: Objective, window: Window, units: Tensor, micro_batches: int = 1
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns this rank's (K,) float64 sum of losses / units, on the device, and summed metrics.

        The gradient must be zero before: after a failed attempt it is cleared.
        `micro_batches`: how many the whole step has, over all ranks; per-step terms are averaged over them.
        Raises: ResourceError where a single document does not fit (with `splitting`).
        """
        divisor = placed(units, model.device)

        def attempt(pieces: list[list[Batch]]) -> tuple[Tensor, dict[str, float]]:
            return self._run(model, objective, window, pieces, divisor, micro_batches)

        if self.splitting is None:
            return attempt([[batch] for batch in window.batches])
        return self.splitting.run(objective, window.batches, attempt, model.clear_gradient, window.step + 1)

    def _run(
        self,
        model: TunedModel,
        objective: Objective,
        window: Window,
        pieces: list[list[Batch]],
        divisor: Tensor,
        micro_batches: int,
    ) -> tuple[Tensor, dict[str, float]]:
        """Every piece of every micro-batch; a per-step term is averaged over a micro-batch's pieces."""
        total = torch.zeros(divisor.shape, dtype=torch.float64, device=model.device)
        metrics: dict[str, float] = defaultdict(float)
        self.losses = []
        with model.unchanged_weights(), model.nothing_left():
            for index, batches in zip(window.indices, pieces, strict=True):
                losses = torch.zeros_like(total)
                for number, batch in enumerate(batches):
                    if self.splitting is not None:
                        self.splitting.running = batch
                    call = Call(step=window.step, micro_batch=index + number * PIECE_STRIDE, seed=self.seed)
                    with calling(call):
                        seed_layer(call, OUTSIDE_LAYERS)
                        output = model.output(batch.inputs)
                        seed_layer(call, AFTER_LAYERS)
                        loss = objective.loss(output, batch)
                        del output
                        _backward(loss, divisor, micro_batches * len(batches), self.loss_scale, model)
                    losses += loss.total.detach().to(torch.float64)
                    for name, value in loss.metrics.items():
                        metrics[name] += value
                    del loss  # its graph's small objects would lie between the freed blocks, and the heap would grow
                self.losses.append(losses)
                total += losses / divisor
        return total, dict(metrics)


def _backward(loss: Loss, units: Tensor, micro_batches: int, scale: float, model: TunedModel) -> None:
    value = (loss.total / units.to(loss.total.dtype)).sum()
    penalty = model.adapter.penalty() if model.adapter else None
    for term in (loss.per_step, penalty):
        if term is not None:
            value = value + term / micro_batches
    (value * scale).backward()  # type: ignore[no-untyped-call]
