"""Losses and log-probabilities at chosen positions. Only this module computes logits for losses, in chunks.

Full logits (B, T, V) never exist. Positions without a label are dropped first. The head computes float32 logits of
the others in chunks of `chunk_tokens`. Each chunk's gradient is computed at once: one pass over the logits gives
loss and gradient. The backward computes log-probabilities again only if the head itself is trained.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction as Context
from torch.utils.checkpoint import checkpoint

from tunekit.contracts import IGNORED, Batch, Head, Loss, ModelOutput, Sums
from tunekit.machine.devices import summing_dtype
from tunekit.machine.placing import to_device
from tunekit.model.call import calling, current_call
from tunekit.objectives.losses.row_sums import log_odds, loss_sums, margin_sums

CHUNK_BYTES = 32 * 2**20 - 4096  # of a chunk's float32 logits; small enough for the heap of a CPU's malloc
LEAST_CHUNK_TOKENS, MOST_CHUNK_TOKENS = 64, 1024


@runtime_checkable
class PartedHead(Protocol):
    """A head whose weights are copied to the device in parts: one range of the vocabulary at a time."""

    def each(self, *, backwards: bool = False) -> Iterator[tuple[int, int, Callable[[Tensor], Tensor]]]:
        """Yields for each range of the vocabulary: its first token id, its size v, and a function that computes its
        float32 logits, (N, D) -> (N, v)."""


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that predict supervised tokens, and these tokens. Position t predicts labels[t + 1].

    Shapes: labels (B, T), on the CPU -> index (N,) into the flattened B * T positions, targets (N,).
    """
    shifted = labels[:, 1:]  # (B, T - 1)
    rows, columns = torch.nonzero(shifted != IGNORED, as_tuple=True)
    return rows * labels.shape[1] + columns, shifted[rows, columns]


class _SummedLoss(torch.autograd.Function):
    """Sum of -log softmax(head(h))[target]; the gradient is computed in the forward, chunk by chunk.

    d loss / d logits = softmax(logits) - onehot(target), written into the logits' buffer. The head's autograd graph,
    with its soft cap, scale or adapter, propagates this to the hidden states and the head's trained parameters.
    """

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int, *parameters: Tensor
    ) -> Tensor:
        if isinstance(head, PartedHead):  # a parted head has no trained parameters
            losses, _, of_hidden = _by_vocabulary(hidden, targets, head, with_gradient=True)
            ctx.save_for_backward(of_hidden)
            return losses.sum()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)  # (N, D)
        gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            losses, chunk_gradients = _chunk_losses_and_gradient(hidden[chunk], targets[chunk], head, parameters)
            total += losses.sum()
            hidden_gradient[chunk] = chunk_gradients[0]
            for gradient, addition in zip(gradients, chunk_gradients[1:], strict=True):
                gradient += addition
        summed = [total.to(own.dtype) for total, own in zip(gradients, parameters, strict=True)]
        ctx.save_for_backward(hidden_gradient, *summed)
        return total

    @staticmethod
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        (hidden_gradient, *gradients), scale = saved, upstream[0]
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            None,
            None,
            None,
            *(gradient * scale for gradient in gradients),
        )


def _chunk_losses_and_gradient(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    parameters: Sequence[Tensor] = (),
    entropies: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses (N,) of a chunk, and the gradients of their sum: for the hidden states first, then for each parameter.

    Shapes: hidden (N, D), targets (N,). `entropies` (N,): the entropies are written to it.
    """
    with torch.enable_grad():
        inputs = hidden.detach().requires_grad_()
        logits = head.logits(inputs)  # (N, V) float32
    work, column = logits.detach(), targets[:, None]  # (N, V), (N, 1)
    aimed = work.gather(1, column)  # (N, 1)
    largest = work.amax(dim=-1, keepdim=True)  # (N, 1)
    total = work.sub_(largest).exp_().sum(dim=-1, keepdim=True)  # (N, 1)
    losses = (total.log() + largest - aimed)[:, 0]  # (N,)
    work.div_(total)
    if entropies is not None:
        entropies.copy_(torch.special.entr(work).sum(dim=-1))
    work.scatter_add_(1, column, torch.full_like(aimed, -1))
    return losses, torch.autograd.grad(logits, [inputs, *parameters], grad_outputs=work)


def _by_vocabulary(
    hidden: Tensor, targets: Tensor, head: PartedHead, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (N,), whether the target is the most likely token (N,), and the losses' gradient for `hidden` (N, D).

    The first pass over the ranges of the vocabulary computes the largest logit and the sum of exponentials. The second
    pass, in reverse order, computes the gradient sum_v (p_v - [v = target]) W_v.
    """
    count, device = hidden.shape[0], hidden.device
    largest = torch.full((count,), -torch.inf, device=device)  # (N,) float32, like total and aimed:
    total, aimed = torch.zeros(count, device=device), torch.zeros(count, device=device)
    for first, size, project in head.each():
        for rows in _position_chunks(count, size):
            logits = project(hidden[rows])  # (n, v)
            column, inside = _columns(targets[rows] - first, size)
            highest = torch.maximum(largest[rows], logits.amax(dim=-1))
            aimed[rows] += logits.gather(1, column)[:, 0] * inside
            total[rows] = total[rows] * (largest[rows] - highest).exp() + logits.sub_(highest[:, None]).exp_().sum(-1)
            largest[rows] = highest
    normaliser = total.log_().add_(largest)  # (N,)
    if not with_gradient:
        return normaliser - aimed, aimed == largest, hidden.new_empty(0)
    gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=device)  # (N, D)
    for first, size, project in head.each(backwards=True):
        for rows in _position_chunks(count, size):
            with torch.enable_grad():
                inputs = hidden[rows].detach().requires_grad_()
                logits = project(inputs)
            slopes = (logits.detach() - normaliser[rows, None]).exp_()  # (n, v)
            column, inside = _columns(targets[rows] - first, size)
            slopes.scatter_add_(1, column, -inside[:, None])
            gradient[rows] += torch.autograd.grad(logits, inputs, slopes)[0]
    return normaliser - aimed, aimed == largest, gradient.to(hidden.dtype)


def _columns(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a range of the vocabulary, (n, 1) int64; and 1 if the target is in the range, else 0."""
    return place.clamp(0, size - 1)[:, None], ((place >= 0) & (place < size)).float()


def _position_chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of positions. The float32 logits of a slice, over `size` tokens, need at most CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // (4 * size))
    return (slice(start, start + step) for start in range(0, count, step))


def summed_loss(
    hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int, head_parameters: Sequence[Tensor] = ()
) -> Tensor:
    """Sum over positions of the negative log-likelihood of `targets`.

    Shapes: hidden (N, D), targets (N,) -> () float32.    `head_parameters`: trained parameters inside the head.
    """
    return _SummedLoss.apply(hidden, targets, head, chunk_tokens, *head_parameters)  # type: ignore[no-untyped-call]


class _LogProbabilities(torch.autograd.Function):
    """log softmax(head(h))[target] of each position under a frozen head.

    d l_n / d h_n depends only on position n. The forward computes these gradients, and the backward scales them.
    """

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int, entropies: Tensor | None
    ) -> Tensor:
        if isinstance(head, PartedHead):
            assert entropies is None, "plan does not stream the head of objectives that need entropies"
            losses, _, of_hidden = _by_vocabulary(hidden, targets, head, with_gradient=True)
            ctx.save_for_backward(of_hidden)
            return losses.neg_()
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)  # (N,)
        gradient = torch.empty_like(hidden)  # (N, D)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            given = None if entropies is None else entropies[chunk]
            found = _chunk_losses_and_gradient(hidden[chunk], targets[chunk], head, entropies=given)
            losses[chunk], (gradient[chunk],) = found
        ctx.save_for_backward(gradient)
        return losses.neg_()

    @staticmethod
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * -upstream[0][:, None].to(gradient.dtype), None, None, None, None


@dataclass(frozen=True)
class TemperedHead:
    """A head whose logits are divided by a temperature."""

    head: Head
    temperature: float

    def logits(self, hidden: Tensor) -> Tensor:
        """The float32 logits: (N, D) -> (N, V)."""
        return self.head.logits(hidden) / self.temperature


def at_temperature(output: ModelOutput, temperature: float) -> ModelOutput:
    """The output, with a head that divides its logits by this temperature."""
    if temperature == 1:
        return output
    assert output.head is not None
    return replace(output, head=TemperedHead(output.head, temperature))


def log_probabilities(output: ModelOutput, index: Tensor, targets: Tensor, entropies: Tensor | None = None) -> Tensor:
    """Log-probability of each target, with gradient.

    Shapes: output.hidden (B, T, D), index (N,) into its flattened positions, targets (N,) -> (N,) float32.
    `entropies` (N,) float32: if gradients are enabled, the entropies are written to it, without gradient.
    """
    hidden, targets, head = _selected(output, index, targets)
    size = output.chunk_tokens
    if not torch.is_grad_enabled():
        return scored_positions(hidden, targets, head, size)[0].neg_()
    if not output.head_parameters:
        return _LogProbabilities.apply(hidden, targets, head, size, entropies)  # type: ignore[no-untyped-call]

    def of_chunk(hidden: Tensor, targets: Tensor, start: int) -> Tensor:
        logits = head.logits(hidden)  # (n, V)
        if entropies is not None:  # recomputation writes it again; autograd checks the version of inputs only
            entropies[start : start + size].copy_(torch.special.entr(logits.detach().softmax(dim=-1)).sum(dim=-1))
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    starts = range(0, max(len(targets), 1), size)
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), starts, strict=True)
    return torch.cat([_checkpointed(of_chunk, *chunk) for chunk in chunks])


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """The divergence between the distributions of two sets of logits. At beta 0: KL(t | s); at beta 1: KL(s | t); else
    beta KL(t | m) + (1 - beta) KL(s | m), m = (1 - beta) s + beta t. Agarwal et al. 2024, eq. 1.

    Shapes: student, teacher (N, V) -> (N,). One head may have unused last rows; the smaller V is used.
    """
    width = min(student.shape[-1], teacher.shape[-1])
    student_log, teacher_log = (
        (logits[:, :width] / temperature).log_softmax(-1) for logits in (student, teacher)
    )  # (N, V)
    if beta in (0, 1):
        true, said = (teacher_log, student_log) if beta == 0 else (student_log, teacher_log)
        return (true.exp() * (true - said)).sum(-1)
    mixed = torch.logaddexp(student_log + math.log1p(-beta), teacher_log + math.log(beta))  # (N, V)
    taught, learned = ((each.exp() * (each - mixed)).sum(-1) for each in (teacher_log, student_log))
    return beta * taught + (1 - beta) * learned


class _Divergences(torch.autograd.Function):
    """`divergence` at each position, for frozen heads. The forward computes the gradient, as in _LogProbabilities."""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, of_chunk: Callable[[Tensor, slice], Tensor], chunk_tokens: int) -> Tensor:
        values = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)  # (N,)
        gradient = torch.empty_like(hidden)  # (N, D)
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                inputs = hidden[chunk].detach().requires_grad_()
                found = of_chunk(inputs, chunk)
            values[chunk] = found.detach()
            (gradient[chunk],) = torch.autograd.grad(found, inputs, torch.ones_like(found))
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None


def divergences(
    output: ModelOutput, index: Tensor, teacher: Tensor, teacher_head: Head, *, beta: float, temperature: float
) -> Tensor:
    """`divergence` between student and teacher at each position, with gradient for the student.

    Shapes: output.hidden (B, T, D), index (N,) into its flattened positions, teacher (N, D') -> (N,) float32.
    """
    assert output.head is not None
    hidden, head, size = hidden_at(output, index), output.head, output.chunk_tokens
    teacher = to_device(teacher, hidden.device)

    def of_chunk(hidden: Tensor, chunk: slice) -> Tensor:
        with torch.no_grad():
            logits = teacher_head.logits(teacher[chunk])  # (n, V)
        return divergence(head.logits(hidden), logits, beta, temperature)

    chunks = [slice(start, start + size) for start in range(0, len(hidden), size)]
    if not torch.is_grad_enabled():
        return torch.cat([of_chunk(hidden[chunk], chunk) for chunk in chunks])
    if not output.head_parameters:
        return _Divergences.apply(hidden, of_chunk, size)  # type: ignore[no-untyped-call]
    return torch.cat([_checkpointed(of_chunk, hidden[chunk], chunk) for chunk in chunks])


def _checkpointed(of_chunk: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Call `of_chunk` with gradient checkpointing. The backward calls it again with the same current_call()."""
    call = current_call()

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), calling(call)

    return checkpoint(of_chunk, *inputs, use_reentrant=False, context_fn=contexts)


@torch.no_grad()
def scored_positions(hidden: Tensor, targets: Tensor, head: Head, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """The loss of each position, and whether the target is the most likely token; without gradient.

    Shapes: hidden (N, D), targets (N,) -> losses (N,) float32, correct (N,) bool.
    """
    if isinstance(head, PartedHead):
        return _by_vocabulary(hidden, targets, head, with_gradient=False)[:2]
    losses, correct = [], []
    for start in range(0, max(hidden.shape[0], 1), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = head.logits(hidden[chunk])  # (n, V) float32
        target = targets[chunk, None]
        losses.append(torch.logsumexp(logits, dim=-1) - logits.gather(1, target)[:, 0])
        correct.append(logits.argmax(dim=-1) == target[:, 0])
    return torch.cat(losses), torch.cat(correct)


def loss_of_positions(output: ModelOutput, index: Tensor, targets: Tensor, weights: Tensor | None = None) -> Loss:
    """The sum of the losses at some positions, with gradient. `weights`: a weight for each position, 1 by default.

    Shapes: output.hidden (B, T, D), index (N,) into its flattened positions, targets, weights (N,) -> total (1,).
    """
    if weights is not None:
        found = log_probabilities(output, index, targets)  # (N,)
        return Loss(-(found * to_device(weights, found.device)).sum()[None])
    hidden, targets, head = _selected(output, index, targets)
    return Loss(summed_loss(hidden, targets, head, output.chunk_tokens, output.head_parameters)[None])


def sums_of_positions(
    output: ModelOutput, index: Tensor, targets: Tensor, weights: Tensor | None, batch: Batch
) -> Sums:
    """Sums over the supervised positions of a batch: `loss_sums`, the number of right predictions, and the number of
    positions. Each position counts with its weight."""
    hidden, targets, head = _selected(output, index, targets)
    losses, correct = scored_positions(hidden, targets, head, output.chunk_tokens)
    count, margins = torch.tensor(float(len(targets)), dtype=torch.float64), margin_sums(log_odds(losses), batch)
    if weights is not None:
        count, weights = weights.sum(dtype=torch.float64), to_device(weights, losses.device)
        losses, correct = losses * weights, correct * weights
    right = correct.sum(dtype=summing_dtype(losses.device))
    return {**loss_sums(losses, batch), **margins, "correct": right, "units": count}


def scores_of_positions(output: ModelOutput, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `scored_positions` at positions `index` (N,) of the flattened (B, T) output."""
    hidden, targets, head = _selected(output, index, targets)
    return scored_positions(hidden, targets, head, output.chunk_tokens)


def logits_at(output: ModelOutput, index: Tensor) -> Tensor:
    """The float32 logits (N, V) at positions `index` (N,) of the flattened (B, T) output."""
    assert output.head is not None
    return output.head.logits(hidden_at(output, index))


def hidden_at(output: ModelOutput, index: Tensor) -> Tensor:
    """The hidden states (N, D) at positions `index` (N,) of the flattened (B, T) output."""
    assert output.hidden is not None
    return output.hidden.flatten(0, 1).index_select(0, to_device(index, output.hidden.device))


def _selected(output: ModelOutput, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Head]:
    """Hidden states (N, D) at the positions, and their targets (N,), on the device."""
    assert output.head is not None
    hidden = hidden_at(output, index)
    return hidden, to_device(targets, hidden.device), output.head


def logits_chunk_tokens(vocabulary_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """The number of positions per chunk: their float32 logits need about `chunk_bytes`. At least 64, at most 1,024."""
    return max(LEAST_CHUNK_TOKENS, min(MOST_CHUNK_TOKENS, chunk_bytes // (4 * vocabulary_size)))
