"""The engine that goes layer by layer: all micro-batches of a pass through one layer before the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunekit.contracts import Batch, Beside, LayerCall, Loss, Objective, Stages, Window
from tunekit.errors import ModelError
from tunekit.memory.offload import BoundaryStore
from tunekit.memory.slots import LayerSlots
from tunekit.memory.splitting import PIECE_STRIDE, Splitting
from tunekit.model.call import AFTER_LAYERS, BETWEEN_STACKS, OUTSIDE_LAYERS, Call, calling, seed_layer
from tunekit.model.placing import placed


@dataclass
class Passage:
    """One micro-batch on its way through the layers."""

    index: int  # of the micro-batch in the step; one that was split has several passages
    pieces: int  # into how many it was split
    batch: Batch
    call: Call
    entered: dict[str, Tensor]  # what the objective calls the network with
    hidden: Tensor = field(init=False)  # (B, T, D) so far; on the way back its gradient
    source: Beside | None = None  # (B, S, D) that the stack before gave
    calls: list[LayerCall] = field(default_factory=list)  # of the layers of all stacks so far


@dataclass
class Needs:
    """What a gradient is needed of, since it depends on something trained: seen as the first micro-batch passes."""

    embeddings: list[bool] = field(default_factory=list)  # of each stack
    layers: list[bool] = field(default_factory=list)  # of each layer: its hidden states
    handed_on: list[list[bool]] = field(default_factory=list)  # of each layer: what it hands on beside them

    def before(self, number: int, stack: int | None) -> bool:
        """Of what enters this layer; `stack`: which one begins with it, if any."""
        return self.layers[number - 1] if stack is None else self.embeddings[stack]

    def learn(self, number: int, stack: int | None, hidden: Tensor, call: LayerCall) -> None:
        """From what a layer gave, computed with a graph of its own."""
        self.layers.append(self.before(number, stack) or hidden.requires_grad)
        values = [None if beside is None else beside.value for beside in call.handed_on]
        self.handed_on.append([value is not None and value.requires_grad for value in values])


class StreamingEngine:
    """Forward and backward of a window, `micro_batches_per_pass` at a time."""

    def __init__(
        self, seed: int, slots: LayerSlots, micro_batches_per_pass: int, splitting: Splitting | None = None
    ) -> None:
        self.seed, self.slots, self.micro_batches_per_pass = seed, slots, micro_batches_per_pass
        self.splitting = splitting
        self.loss_scale = 1.0
        self.losses: list[Tensor] = []
        self._stages: Stages | None = None
        self._needs: Needs | None = None

    def run_window(
        self, model: Any, objective: Objective, window: Window, units: Tensor, micro_batches: int = 1
    ) -> tuple[Tensor, dict[str, float]]:
        """As ResidentEngine.run_window."""
        self._stages = self._stages or _stages_of(model)
        work = _Work(model, self._stages, objective, placed(units, model.device), micro_batches, self.loss_scale)

        def attempt(pieces: list[list[Batch]]) -> tuple[Tensor, dict[str, float]]:
            return self._run(work, window, pieces)

        if self.splitting is None:
            return attempt([[batch] for batch in window.batches])
        return self.splitting.run(objective, window.batches, attempt, model.clear_gradient, window.step + 1)

    def _run(self, work: _Work, window: Window, pieces: list[list[Batch]]) -> tuple[Tensor, dict[str, float]]:
        """Every piece of every micro-batch, so many at a time."""
        losses = {index: torch.zeros_like(work.units) for index in window.indices}
        metrics: dict[str, float] = defaultdict(float)
        entries = [
            (index, number, len(batches), batch)
            for index, batches in zip(window.indices, pieces, strict=True)
            for number, batch in enumerate(batches)
        ]
        with work.model.unchanged_weights(), work.model.nothing_left():
            for start in range(0, len(entries), self.micro_batches_per_pass):
                passages, needs = self._forward(work, window.step, entries[start : start + self.micro_batches_per_pass])
                for passage in passages:
                    loss = self._turn(work, passage, needs.layers[-1])
                    losses[passage.index] += loss.total.detach().to(torch.float64)
                    for name, value in loss.metrics.items():
                        metrics[name] += value
                    del loss  # its graph must not live on
                self._backward(work, needs, passages)
        self.losses = list(losses.values())
        total = torch.zeros_like(work.units)
        for each in self.losses:
            total += each / work.units
        return total, dict(metrics)

    def _forward(
        self, work: _Work, step: int, entries: Sequence[tuple[int, int, int, Batch]]
    ) -> tuple[list[Passage], Needs]:
        """Embeddings and every layer, without a graph. Of the first micro-batch of all a graph is made, layer by layer,
        to see what needs a gradient."""
        passages = [self._begin(work, step, *entry) for entry in entries]
        needs, first = (Needs(), passages[0]) if self._needs is None else (self._needs, None)
        last = len(work.layers) - 1
        for number in range(len(work.layers)):
            if number in work.starts:
                for passage in passages:
                    self._enter(work, needs, passage, number, passage is first)
            with self.slots.holding(number, min(number + 1, last)):
                for passage in passages:
                    self._through(work, needs, passage, number, passage is first)
        self._needs = needs  # not before: an attempt that failed half-way has not seen all
        return passages, needs

    def _begin(self, work: _Work, step: int, index: int, number: int, pieces: int, batch: Batch) -> Passage:
        inputs = batch.inputs
        with calling(Call(step=step, micro_batch=index + number * PIECE_STRIDE, seed=self.seed)):
            return Passage(index, pieces, batch, work.model.call_for(inputs), inputs)

    def _enter(self, work: _Work, needs: Needs, passage: Passage, number: int, learning: bool) -> None:
        """What comes before the first layer of a stack."""
        if number > 0:
            passage.source = Beside(passage.hidden.requires_grad_(needs.layers[number - 1]))
        with calling(passage.call), torch.set_grad_enabled(learning):
            hidden, calls = _embedded(work, passage, work.starts[number])
        if learning:
            needs.embeddings.append(hidden.requires_grad)
        passage.hidden = hidden.detach()
        passage.calls += calls

    def _through(self, work: _Work, needs: Needs, passage: Passage, number: int, learning: bool) -> None:
        """One layer, whose input is kept where it is computed again."""
        self._running(passage)
        if learning or needs.layers[number]:
            work.store.put((id(passage), number), passage.hidden, stays=number == len(work.layers) - 1)
        call = passage.calls[number]
        with calling(passage.call), torch.set_grad_enabled(learning):
            seed_layer(passage.call, number)
            hidden = work.layers[number](passage.hidden, call)
        if learning:
            needs.learn(number, work.starts.get(number), hidden, call)
        for beside, needed in zip(call.handed_on, needs.handed_on[number], strict=True):
            if beside is not None and beside.value is not None:
                beside.value = beside.value.detach().requires_grad_(needed)
        passage.hidden = hidden.detach()

    def _running(self, passage: Passage) -> None:
        if self.splitting is not None:
            self.splitting.running = passage.batch

    def _turn(self, work: _Work, passage: Passage, needed: bool) -> Loss:
        """What comes after the last layer, forward and backward; leaves the gradient of the last hidden states."""
        self._running(passage)
        hidden = passage.hidden.requires_grad_(needed)
        with calling(passage.call):
            output = work.model.finished(work.model.leaving(hidden))
            seed_layer(passage.call, AFTER_LAYERS)
            loss = work.objective.loss(output, passage.batch)
            value = (loss.total / work.units.to(loss.total.dtype)).sum()
            for term in (loss.per_step, work.penalty(None)):
                if term is not None:
                    value = value + term / (work.micro_batches * passage.pieces)
            (value * work.loss_scale).backward()  # type: ignore[no-untyped-call]
        passage.hidden = hidden.grad if hidden.grad is not None else hidden.detach()
        return loss

    def _backward(self, work: _Work, needs: Needs, passages: Sequence[Passage]) -> None:
        """Every layer again, with a graph of its own, down to the lowest that needs a gradient."""
        for number in reversed(range(len(work.layers))):
            if not needs.layers[number]:
                break
            goes_on = number > 0 and needs.layers[number - 1]
            with self.slots.holding(number, number - 1 if goes_on else 0):
                for passage, after in zip(passages, [*passages[1:], None], strict=True):
                    coming = (id(passages[0]), number - 1) if after is None else (id(after), number)
                    self._back_through(work, needs, passage, number, coming)
            if number in work.starts:
                for passage in passages:
                    _back_below(work, needs, passage, work.starts[number])
        for passage in passages:  # of the first micro-batch, layers that need none
            for number in range(len(work.layers)):
                work.store.drop((id(passage), number))

    def _back_through(self, work: _Work, needs: Needs, passage: Passage, number: int, coming: tuple[int, int]) -> None:
        """One layer computed again; its gradients, and those of what entered it where something below is trained."""
        self._running(passage)
        key, call = (id(passage), number), passage.calls[number]
        hidden = work.store.take(key).detach().requires_grad_(needs.before(number, work.starts.get(number)))
        work.store.prefetch(coming)
        above = [(beside, _taken(beside)) for beside in call.handed_on if beside is not None]
        before = [(beside.value, _taken(beside)) for beside in call.read]
        with calling(passage.call):
            seed_layer(passage.call, number)
            output = work.layers[number](hidden, call)
        roots = [(output, passage.hidden), *before, *((beside.value, gradient) for beside, gradient in above)]
        penalty = work.penalty(number)
        if penalty is not None:
            value = penalty / (work.micro_batches * passage.pieces) * work.loss_scale
            roots.append((value, torch.ones_like(penalty)))
        roots = [(root, gradient) for root, gradient in roots if gradient is not None]
        torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        work.store.drop(key)
        for beside, _ in above:
            beside.value = None
        if hidden.grad is not None:
            passage.hidden = hidden.grad


def _taken(beside: Beside) -> Tensor | None:
    """The gradient that the layers above left; the sum goes on from it as a root of the next graph."""
    if beside.value is None:
        return None
    gradient, beside.value.grad = beside.value.grad, None
    return gradient


def _back_below(work: _Work, needs: Needs, passage: Passage, stack: int) -> None:
    """What lies below the first layer of a stack: its embedding, and what the stack before gave."""
    if needs.embeddings[stack]:
        with calling(passage.call):
            _embedded(work, passage, stack)[0].backward(passage.hidden)  # type: ignore[no-untyped-call]
    gradient = None if passage.source is None else _taken(passage.source)
    if gradient is not None:
        passage.hidden = gradient
    passage.source = None


class _Work:
    """What stays the same within a window."""

    def __init__(
        self, model: Any, stages: Stages, objective: Objective, units: Tensor, micro_batches: int, loss_scale: float
    ) -> None:
        self.model, self.stages, self.objective = model, stages, objective
        self.layers = stages.layers
        self.starts = stages.starts
        self.units, self.micro_batches, self.loss_scale = units, micro_batches, loss_scale
        self.store: BoundaryStore = BoundaryStore(None) if model.boundaries is None else model.boundaries
        self._parts: dict[int | None, list[Any]] = defaultdict(list)
        places = {module: number for number, layer in enumerate(self.layers) for module in layer.modules()}
        for part in model.adapter.parts() if model.adapter else []:
            self._parts[places.get(part)].append(part)

    def penalty(self, number: int | None) -> Tensor | None:
        """() float32: the penalties of the adapter's parts in one layer, or (None) outside all of them."""
        found = [penalty for part in self._parts[number] for penalty in [part.penalty()] if penalty is not None]
        return torch.stack(found).sum() if found else None


def _embedded(work: _Work, passage: Passage, stack: int) -> tuple[Tensor, list[LayerCall]]:
    """(B, T, D), and what the layers of the stack are called with."""
    seed_layer(passage.call, OUTSIDE_LAYERS)
    inputs = work.model.entering(passage.entered)
    if stack > 0:
        seed_layer(passage.call, BETWEEN_STACKS)
    return work.stages.stacks[stack].embed(inputs, passage.source)


def _stages_of(model: Any) -> Stages:
    """Raises: ModelError for a base that nobody has compared layer by layer; plan refuses it before."""
    stages: Stages | None = model.base.family.stages(model.base.net)
    if stages is None:
        raise ModelError(
            f"{model.base.facts.model_type} cannot be computed layer by layer",
            "write memory.streaming: off",
            key="memory.streaming",
        )
    return stages
