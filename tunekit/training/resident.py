"""The engine for a base whose weights are all on the device: one micro-batch after the other.

Comes in: a window and the step's units.  Goes out: the gradient of (sum of losses / units), in the flat buffers.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from tunekit.memory.checkpointing import AFTER_LAYERS, OUTSIDE_LAYERS, seed_layer
from tunekit.model.call import Call, calling
from tunekit.model.placing import placed
from tunekit.protocols import Loss, Objective, Window
from tunekit.training.tuned import TunedModel


class ResidentEngine:
    """Forward and backward of each micro-batch; only one micro-batch's activations live at a time."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.loss_scale = 1.0  # float16's; multiplies the loss before the backward pass
        self.losses: list[Tensor] = []  # of each micro-batch of the last window, on the device; names the rows of a NaN

    def run_window(
        self, model: TunedModel, objective: Objective, window: Window, units: Tensor, micro_batches: int = 1
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns this rank's (K,) float64 sum of losses / units, on the device, and summed metrics.

        `micro_batches`: how many the whole step has, over all ranks; per-step terms are averaged over them.
        """
        total = torch.zeros(units.shape, dtype=torch.float64, device=model.device)
        divisor = placed(units, model.device)
        metrics: dict[str, float] = defaultdict(float)
        self.losses = []
        with model.unchanged_weights():
            for index, batch in zip(window.indices, window.batches, strict=True):
                call = Call(step=window.step, micro_batch=index, seed=self.seed)
                with calling(call):
                    seed_layer(call, OUTSIDE_LAYERS)
                    hidden = model.hidden(objective.inputs(batch))
                    seed_layer(call, AFTER_LAYERS)
                    loss = objective.loss(hidden, model.head(), batch, model.head_parameters())
                    del hidden
                    _backward(loss, divisor, micro_batches, self.loss_scale, model)
                self.losses.append(loss.total.detach().to(torch.float64))
                total += self.losses[-1] / divisor
                for name, value in loss.metrics.items():
                    metrics[name] += value
        return total, dict(metrics)


def _backward(loss: Loss, units: Tensor, micro_batches: int, scale: float, model: TunedModel) -> None:
    value = (loss.total / units.to(loss.total.dtype)).sum()
    penalty = model.adapter.penalty() if model.adapter else None
    for term in (loss.per_step, penalty):
        if term is not None:
            value = value + term / micro_batches
    (value * scale).backward()  # type: ignore[no-untyped-call]
