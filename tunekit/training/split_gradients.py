"""The gradients of single rows from one forward and backward of several rows.

For an update y = x A^T B^T with g = dL/dy, the gradients of row n are dA_n = (g_n B)^T x_n and dB_n = g_n^T (x_n A^T).
Hooks take x and g of each adapted layer. Other additive layers and trained copies run again for each row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.base import AdapterPart, LayerAdapter
from tunekit.adapters.copies import TrainedCopy
from tunekit.contracts import Objective, Row
from tunekit.evaluation.scores import prepared, undisturbed
from tunekit.model.attention.real_tokens import RealTokens
from tunekit.model.call import Call, calling, current_call
from tunekit.tuned.model import TunedModel

Take = Callable[[str, Tensor], None]  # gets the gradients (P, ...) of a trained tensor for P rows, by name


def can_split(model: TunedModel) -> bool:
    """Whether all trained tensors are in additive layers and trained copies, on a base that is not streamed."""
    assert model.adapter is not None
    return model.slots is None and all(
        part.is_additive if isinstance(part, LayerAdapter) else isinstance(part, TrainedCopy)
        for part in model.adapter.parts()
    )


def split_gradients(model: TunedModel, objective: Objective, rows: Sequence[Row], take: Take) -> None:
    """Compute the loss of all rows together, and call `take` with the gradients of each row's summed loss."""
    with undisturbed(model):
        batch = prepared(model, objective, objective.rows.collate([[row] for row in rows]))
    with model.training_mode(False), model.unchanged_weights(), calling(Call()), _splitting(model, len(rows), take):
        loss = objective.loss.loss(model.output(batch.inputs), batch)
        loss.total.sum().backward()  # type: ignore[no-untyped-call]


@contextmanager
def _splitting(model: TunedModel, count: int, take: Take) -> Iterator[None]:
    """A block in which a backward of `count` rows calls `take`. At its end, the gradients of all rows together are
    freed."""
    assert model.adapter is not None

    def hook(part: AdapterPart, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs and torch.is_grad_enabled() and output.requires_grad:
            x, real = inputs[0].detach(), current_call().real_tokens

            def split(gradient: Tensor) -> None:
                _split(part, x, gradient, count, real, take)

            output.register_hook(split)  # type: ignore[no-untyped-call]

    with ExitStack() as hooks:
        for part in model.adapter.parts():
            hooks.callback(part.register_forward_hook(hook).remove)
        try:
            yield
        finally:
            for parameter in model.adapter.trained().values():
                parameter.grad = None


def _split(part: AdapterPart, x: Tensor, gradient: Tensor, count: int, real: RealTokens | None, take: Take) -> None:
    """Call `take` with the gradients of a part's tensors. Line l of x and of `gradient` belongs to row l % `count`."""
    if real is not None and x.shape[:2] == (1, len(real.filled_index)):
        x, gradient = real.padded(x), real.padded(gradient)
    if len(x) % count or len(x) != len(gradient):
        return  # no line for each row: the caller sees that the gradients are wrong
    named = {part.name_of(slot): getattr(part, name) for name, slot in part.declared.items() if slot.kind == "trained"}
    tensors = list(named.values())
    if isinstance(part, LayerAdapter) and part.is_thin:
        gradients = _of_factors(part, tensors, x, gradient, count)
    else:
        gradients = _of_rows(part, tensors, x, gradient, count)
    for name, values in zip(named, gradients, strict=True):
        take(name, values)


@torch.enable_grad()
def _of_factors(
    layer: LayerAdapter[Any], tensors: Sequence[nn.Parameter], x: Tensor, gradient: Tensor, count: int
) -> Sequence[Tensor]:
    """The gradients (P, ...) of the tensors from which a layer computes its factors."""
    a, b = layer.thin_factors()
    with torch.no_grad():
        x, g = _by_row(x, count), _by_row(gradient, count)  # (P, S T, I), (P, S T, O)
        of_a, of_b = (g @ b).transpose(1, 2) @ x, g.transpose(1, 2) @ (x @ a.t())  # (P, R, I), (P, O, R)
    # LoRA-FA does not train A
    factors, gradients = zip(*(pair for pair in ((a, of_a), (b, of_b)) if pair[0].requires_grad), strict=True)
    return torch.autograd.grad(factors, tensors, gradients, is_grads_batched=True)


def _by_row(values: Tensor, count: int) -> Tensor:
    """(S P, T, D) or (S P, D), for S lines of each of P rows -> (P, S T, D) float32."""
    size = values.shape[-1]
    return values.float().reshape(-1, count, values[0].numel() // size, size).transpose(0, 1).flatten(1, 2)


@torch.enable_grad()
def _of_rows(
    part: AdapterPart, tensors: Sequence[nn.Parameter], x: Tensor, gradient: Tensor, count: int
) -> Sequence[Tensor]:
    """The gradients (P, ...) of a part's tensors, one row after the other."""
    run = part.update if isinstance(part, LayerAdapter) else part.forward
    rows = [torch.autograd.grad(run(x[number::count]), tensors, gradient[number::count]) for number in range(count)]
    return [torch.stack(each) for each in zip(*rows, strict=True)]
