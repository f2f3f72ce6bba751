"""The engine for a base whose layers do not stay on the device: layer by layer, all micro-batches through one layer
before the next, so that weights are copied twice for each pass and not twice for each micro-batch.

Comes in: LayerSlots, a window and the step's units.  Goes out: the same gradient that the resident engine leaves, bit
for bit where a trained tensor belongs to one layer, else up to the order of sums.  Next: training/engines.py.

Forward: no graph; the input of each layer is kept. Backward: each layer is computed again from its input, with a graph
for that layer alone. Source of the order: Pudipeddi et al. 2020 (L2L), arXiv 2002.05645.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.errors import ModelError
from tunekit.memory.blobs import LayerBlob
from tunekit.memory.checkpointing import AFTER_LAYERS, OUTSIDE_LAYERS, seed_layer
from tunekit.memory.copying import Copier, CudaCopier, NoCopies, ThreadCopier
from tunekit.memory.offload import BoundaryStore
from tunekit.memory.slots import SLOTS, LayerSlots
from tunekit.memory.splitting import PIECE_STRIDE, Splitting
from tunekit.model.call import Call, calling
from tunekit.model.placing import placed
from tunekit.protocols import Batch, Loss, Objective, Stages, Window


def make_slots(
    tensors: Sequence[Sequence[Tensor]],
    device: torch.device,
    *,
    tier: str,
    mapped: frozenset[int] = frozenset(),
    count: int = SLOTS,
    poison: bool = False,
) -> LayerSlots:
    """Slots for layers with these frozen tensors, which wait in the host's memory (tier `host`) or where they are
    (`disk`). `mapped`: addresses of those that are views into shared read-only mappings: their pages are given back."""
    blobs = [LayerBlob(each) for each in tensors]
    if tier == "host":
        for blob in blobs:
            blob.gather(pinned=device.type == "cuda", mapped=mapped)
            blob.unbind(device)  # so that no layer is held twice for longer than it is copied
    return LayerSlots(blobs, _make_copier(device, mapped), device, count=count, poison=poison)


def _make_copier(device: torch.device, mapped: frozenset[int]) -> Copier:
    if device.type == "cuda":
        return CudaCopier(device, mapped)
    return NoCopies() if device.type == "meta" else ThreadCopier(mapped)


def stream_layers(layers: Sequence[nn.Module], slots: LayerSlots) -> None:
    """Whoever calls a layer finds it in its slot: evaluation, generation, probes. An engine that holds it already
    changes nothing."""
    for number, layer in enumerate(layers):
        layer.forward = _held(layer.forward, number, (number + 1) % len(layers), slots)


def gather_on_host(embedding: nn.Module, device: torch.device) -> None:
    """Keep a token embedding on the host: the rows of a batch's ids are gathered there and sent to the device, which
    never holds the table.    Shapes: ids (B, T) on the device -> (B, T, D) there."""
    embedding.to("cpu")
    plain = embedding.forward

    def gathered(ids: Tensor) -> Tensor:
        rows: Tensor = plain(ids.to("cpu"))  # (B, T, D)
        return placed(rows, device)

    embedding.forward = gathered


def _held(forward: Any, number: int, then: int, slots: LayerSlots) -> Any:
    def run(*inputs: Any, **named: Any) -> Any:
        with slots.holding(number, then):
            return forward(*inputs, **named)

    return run


@dataclass
class Passage:
    """One micro-batch on its way through the layers."""

    index: int  # of the micro-batch in the step; one that was split has several passages
    pieces: int  # into how many it was split
    batch: Batch
    call: Call
    entered: dict[str, Tensor]  # what the objective calls the network with
    hidden: Tensor  # (B, T, D) so far; on the way back its gradient
    keywords: dict[str, Any]  # what every layer is called with


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
        self._trained: list[bool] = []  # of embedding, then of each layer: whether it holds what is trained

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
        return self.splitting.run(window.batches, attempt, model.clear_gradient, window.step + 1)

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
                passages = self._forward(work, window.step, entries[start : start + self.micro_batches_per_pass])
                for passage in passages:
                    loss = self._turn(work, passage)
                    losses[passage.index] += loss.total.detach().to(torch.float64)
                    for name, value in loss.metrics.items():
                        metrics[name] += value
                    del loss  # its graph must not live on
                self._backward(work, passages)
        self.losses = list(losses.values())
        total = torch.zeros_like(work.units)
        for each in self.losses:
            total += each / work.units
        return total, dict(metrics)

    def _forward(self, work: _Work, step: int, entries: Sequence[tuple[int, int, int, Batch]]) -> list[Passage]:
        """Embedding and every layer, without a graph. Of the first micro-batch of all a graph is made, layer by layer,
        to see which of them hold what is trained."""
        learning = not self._trained
        passages: list[Passage] = []
        for index, number, pieces, batch in entries:
            call = Call(step=step, micro_batch=index + number * PIECE_STRIDE, seed=self.seed)
            passages.append(self._enter(work, index, pieces, call, batch, learning and not passages))
        last = len(work.stages.layers) - 1
        for number, layer in enumerate(work.stages.layers):
            with self.slots.holding(number, min(number + 1, last)):
                for passage in passages:
                    self._running(passage)
                    first = learning and passage is passages[0]
                    if learning or self._trained_up_to(number):
                        work.store.put((id(passage), number), passage.hidden, stays=number == last)
                    with calling(passage.call), torch.set_grad_enabled(first):
                        seed_layer(passage.call, number)
                        hidden = layer(passage.hidden, **passage.keywords)
                    if first:
                        self._trained.append(hidden.requires_grad)
                    passage.hidden = hidden.detach()
                    del hidden
        return passages

    def _enter(self, work: _Work, index: int, pieces: int, plain: Call, batch: Batch, first: bool) -> Passage:
        """What comes before the first layer."""
        inputs = work.objective.inputs(batch)
        with calling(plain):
            call = work.model.call_for(inputs)
        with calling(call), torch.set_grad_enabled(first):
            hidden, keywords = _embedded(work, call, inputs)
        if first:
            self._trained.append(hidden.requires_grad)
        return Passage(index, pieces, batch, call, inputs, hidden.detach(), keywords)

    def _trained_up_to(self, number: int) -> bool:
        """Whether the embedding or a layer up to this one (-1: the embedding alone) holds what is trained."""
        return any(self._trained[: number + 2])

    def _running(self, passage: Passage) -> None:
        if self.splitting is not None:
            self.splitting.running = passage.batch

    def _turn(self, work: _Work, passage: Passage) -> Loss:
        """What comes after the last layer, forward and backward; leaves the gradient of the last hidden states."""
        self._running(passage)
        hidden = passage.hidden.requires_grad_(any(self._trained))
        with calling(passage.call):
            output = work.model.leaving(work.stages.finish(hidden))
            seed_layer(passage.call, AFTER_LAYERS)
            loss = work.objective.loss(output, work.model.head(), passage.batch, work.model.head_parameters())
            value = (loss.total / work.units.to(loss.total.dtype)).sum()
            for term in (loss.per_step, work.penalty(None)):
                if term is not None:
                    value = value + term / (work.micro_batches * passage.pieces)
            (value * work.loss_scale).backward()  # type: ignore[no-untyped-call]
        passage.hidden = hidden.grad if hidden.grad is not None else hidden.detach()
        return loss

    def _backward(self, work: _Work, passages: Sequence[Passage]) -> None:
        """Every layer again, with a graph of its own, down to the lowest that is trained."""
        for number in reversed(range(len(work.stages.layers))):
            if not self._trained_up_to(number):
                break
            goes_on = self._trained_up_to(number - 1)
            with self.slots.holding(number, max(number - 1, 0) if goes_on else 0):
                for passage, after in zip(passages, [*passages[1:], None], strict=True):
                    coming = (id(passages[0]), number - 1) if after is None else (id(after), number)
                    self._back_through(work, passage, number, goes_on, coming)
        if self._trained[0]:
            for passage in passages:
                with calling(passage.call):
                    _embedded(work, passage.call, passage.entered)[0].backward(passage.hidden)  # type: ignore[no-untyped-call]
        for passage in passages:  # of the first window, layers below the lowest that is trained
            for number in range(len(work.stages.layers)):
                work.store.drop((id(passage), number))

    def _back_through(self, work: _Work, passage: Passage, number: int, goes_on: bool, coming: tuple[int, int]) -> None:
        """One layer computed again; its gradients, and that of its input where something below is trained."""
        self._running(passage)
        key = (id(passage), number)
        hidden = work.store.take(key).detach().requires_grad_(goes_on)
        work.store.prefetch(coming)
        with calling(passage.call):
            seed_layer(passage.call, number)
            output = work.stages.layers[number](hidden, **passage.keywords)
        roots, gradients = [output], [passage.hidden]
        penalty = work.penalty(number)
        if penalty is not None:
            roots.append(penalty / (work.micro_batches * passage.pieces) * work.loss_scale)
            gradients.append(torch.ones_like(penalty))
        torch.autograd.backward(roots, gradients)
        work.store.drop(key)
        if hidden.grad is not None:
            passage.hidden = hidden.grad


class _Work:
    """What stays the same within a window."""

    def __init__(
        self, model: Any, stages: Stages, objective: Objective, units: Tensor, micro_batches: int, loss_scale: float
    ) -> None:
        self.model, self.stages, self.objective = model, stages, objective
        self.units, self.micro_batches, self.loss_scale = units, micro_batches, loss_scale
        self.store: BoundaryStore = BoundaryStore(None) if model.boundaries is None else model.boundaries
        self._parts: dict[int | None, list[Any]] = defaultdict(list)
        places = {module: number for number, layer in enumerate(stages.layers) for module in layer.modules()}
        for part in model.adapter.parts() if model.adapter else []:
            self._parts[places.get(part)].append(part)

    def penalty(self, number: int | None) -> Tensor | None:
        """() float32: the penalties of the adapter's parts in one layer, or (None) outside all of them."""
        found = [penalty for part in self._parts[number] for penalty in [part.penalty()] if penalty is not None]
        return torch.stack(found).sum() if found else None


def _embedded(work: _Work, call: Call, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """(B, T, D), and what every layer is called with."""
    seed_layer(call, OUTSIDE_LAYERS)
    return work.stages.embed(work.model.entering(inputs))


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
