"""The engine that goes layer by layer: all micro-batches of a pass through one layer before the next, so that weights
are copied twice for each pass and not twice for each micro-batch.

It leaves the gradient of the resident engine, bit for bit where a trained tensor belongs to one layer, else up to the
order of sums.

Forward: no graph; the input of each layer is kept. Backward: each layer is computed again from its input, with a graph
for that layer alone. Source of the order: Pudipeddi et al. 2020 (L2L), arXiv 2002.05645.
What an encoder gave stays on the device while the decoder's layers run, for each of them reads it; its gradient, like
that of every side input, is summed in the order in which one graph would sum it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.attach import total_penalty
from tunekit.contracts import LayerCall, SideInput, Stages, Tensors
from tunekit.errors import ModelError
from tunekit.memory.slots import LayerSlots
from tunekit.memory.splitting import Splitting
from tunekit.model.call import BETWEEN_STACKS, OUTSIDE_LAYERS, Call, calling, seed_layer
from tunekit.model.load import LoadedModel
from tunekit.training.engines.window import Piece, WindowEngine, WindowRun


@dataclass(eq=False)
class PieceState:
    """One piece on its way through the layers."""

    piece: Piece
    call: Call
    inputs: Tensors  # what the network is called with
    hidden: Tensor = field(init=False)  # (B, T, D) so far; on the way back its gradient
    source: SideInput | None = None  # (B, S, D) that the stack before gave
    calls: list[LayerCall] = field(default_factory=list)  # of the layers of all stacks so far


@dataclass
class RequiresGrad:
    """What depends on something trained, and so requires a gradient: seen as the first micro-batch passes."""

    embeddings: list[bool] = field(default_factory=list)  # of each stack
    layers: list[bool] = field(default_factory=list)  # of each layer: its hidden states
    side_outputs: list[list[bool]] = field(default_factory=list)  # of each layer

    def before(self, number: int, stack: int | None) -> bool:
        """Whether what enters this layer does; `stack`: which one begins with it, if any."""
        return self.layers[number - 1] if stack is None else self.embeddings[stack]

    def learn(self, number: int, stack: int | None, hidden: Tensor, call: LayerCall) -> None:
        """From what a layer gave, computed with a graph of its own."""
        self.layers.append(self.before(number, stack) or hidden.requires_grad)
        values = [None if side is None else side.value for side in call.side_outputs]
        self.side_outputs.append([value is not None and value.requires_grad for value in values])


class StreamingEngine(WindowEngine):
    """Forward and backward of a window, `micro_batches_per_pass` at a time."""

    def __init__(
        self, seed: int, slots: LayerSlots, micro_batches_per_pass: int, splitting: Splitting | None = None
    ) -> None:
        super().__init__(seed, splitting)
        self.slots, self.micro_batches_per_pass = slots, micro_batches_per_pass
        self._stages: Stages | None = None
        self._requires: RequiresGrad | None = None

    def _run(self, run: WindowRun, pieces: Sequence[Piece]) -> None:
        self._stages = self._stages or _stages_of(run.model.base)
        for start in range(0, len(pieces), self.micro_batches_per_pass):
            layers = _LayerPass(run, self._stages, self.slots, self._requires)
            states = [layers.begin(piece) for piece in pieces[start : start + self.micro_batches_per_pass]]
            layers.forward(states)
            self._requires = layers.requires  # not before: an attempt that failed half-way has not seen all
            for state in states:
                layers.turn(state)
            layers.backward(states)


class _LayerPass:
    """Some pieces through all layers and back. `requires` None: the first piece finds it out."""

    def __init__(self, run: WindowRun, stages: Stages, slots: LayerSlots, requires: RequiresGrad | None) -> None:
        self.run, self.slots = run, slots
        self.stacks, self.layers, self.stack_at = stages.stacks, stages.layers, stages.stack_at
        self.requires, self.learns = requires or RequiresGrad(), requires is None
        self.store = run.model.boundaries
        self._adapters: dict[int | None, list[Any]] = defaultdict(list)
        numbers = {module: number for number, layer in enumerate(self.layers) for module in layer.modules()}
        for part in run.model.adapter.parts() if run.model.adapter else []:
            self._adapters[numbers.get(part)].append(part)

    def begin(self, piece: Piece) -> PieceState:
        """The piece before the first layer."""
        inputs = piece.batch.inputs
        with calling(self.run.call(piece)):
            return PieceState(piece, self.run.model.call_for(inputs), inputs)

    def forward(self, states: Sequence[PieceState]) -> None:
        """Embeddings and every layer, without a graph. Of a piece to learn from a graph is made, layer by layer."""
        learner = states[0] if self.learns else None
        last = len(self.layers) - 1
        for number in range(len(self.layers)):
            if number in self.stack_at:
                for state in states:
                    self._embed(state, number, state is learner)
            with self.slots.holding(number, min(number + 1, last)):
                for state in states:
                    self._layer_forward(state, number, state is learner)

    def _embed(self, state: PieceState, number: int, learning: bool) -> None:
        """What comes before the first layer of a stack."""
        if number > 0:
            state.source = SideInput(state.hidden.requires_grad_(self.requires.layers[number - 1]))
        with calling(state.call), torch.set_grad_enabled(learning):
            hidden, calls = self._embedded(state, self.stack_at[number])
        if learning:
            self.requires.embeddings.append(hidden.requires_grad)
        state.hidden = hidden.detach()
        state.calls += calls

    def _embedded(self, state: PieceState, stack: int) -> tuple[Tensor, list[LayerCall]]:
        """(B, T, D), and what the layers of the stack are called with."""
        seed_layer(state.call, OUTSIDE_LAYERS)
        inputs = self.run.model.entering(state.inputs)
        if stack > 0:
            seed_layer(state.call, BETWEEN_STACKS)
        return self.stacks[stack].embed(inputs, state.source)

    def _layer_forward(self, state: PieceState, number: int, learning: bool) -> None:
        """One layer, whose input is kept where it is computed again."""
        self.run.computing(state.piece)
        if learning or self.requires.layers[number]:
            self.store.put((id(state), number), state.hidden, stays=number == len(self.layers) - 1)
        call = state.calls[number]
        with torch.set_grad_enabled(learning):
            hidden = self._computed(state, number, state.hidden)
        if learning:
            self.requires.learn(number, self.stack_at.get(number), hidden, call)
        for side, needed in zip(call.side_outputs, self.requires.side_outputs[number], strict=True):
            if side is not None and side.value is not None:
                side.value = side.value.detach().requires_grad_(needed)
        state.hidden = hidden.detach()

    def _computed(self, state: PieceState, number: int, hidden: Tensor) -> Tensor:
        """(B, T, D) after one layer."""
        with calling(state.call):
            seed_layer(state.call, number)
            output: Tensor = self.layers[number](hidden, state.calls[number])
        return output

    def turn(self, state: PieceState) -> None:
        """What comes after the last layer, forward and backward; leaves the gradient of the last hidden states."""
        self.run.computing(state.piece)
        hidden = state.hidden.requires_grad_(self.requires.layers[-1])
        with calling(state.call):
            output = self.run.model.finished(self.run.model.leaving(hidden))
            self.run.backward(state.piece, output, lambda: self._penalty(None))
        state.hidden = hidden.grad if hidden.grad is not None else hidden.detach()

    def backward(self, states: Sequence[PieceState]) -> None:
        """Every layer again, with a graph of its own, down to the lowest that requires a gradient."""
        for number in reversed(range(len(self.layers))):
            if not self.requires.layers[number]:
                break
            goes_on = number > 0 and self.requires.layers[number - 1]
            with self.slots.holding(number, number - 1 if goes_on else 0):
                for state, after in zip(states, [*states[1:], None], strict=True):
                    coming = (id(states[0]), number - 1) if after is None else (id(after), number)
                    self._layer_backward(state, number, coming)
            if number in self.stack_at:
                for state in states:
                    self._embedding_backward(state, self.stack_at[number])
        for state in states:  # of the piece that was learned from, layers that require none
            for number in range(len(self.layers)):
                self.store.drop((id(state), number))

    def _layer_backward(self, state: PieceState, number: int, coming: tuple[int, int]) -> None:
        """One layer computed again; its gradients, and those of what entered it where something below is trained."""
        self.run.computing(state.piece)
        key, call = (id(state), number), state.calls[number]
        hidden = self.store.take(key).detach()
        hidden.requires_grad_(self.requires.before(number, self.stack_at.get(number)))
        self.store.prefetch(coming)
        given = [side for side in call.side_outputs if side is not None]
        of_given = [_take_gradient(side) for side in given]
        roots = [(side.value, _take_gradient(side)) for side in call.side_inputs]
        output = self._computed(state, number, hidden)
        roots = [(output, state.hidden), *roots]
        roots += [(side.value, gradient) for side, gradient in zip(given, of_given, strict=True)]
        penalty = self._penalty(number)
        if penalty is not None:
            value = penalty / state.piece.shares * self.run.engine.loss_scale
            roots.append((value, torch.ones_like(penalty)))
        pairs = [(root, gradient) for root, gradient in roots if root is not None and gradient is not None]
        torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])
        self.store.drop(key)
        for side in given:
            side.value = None
        if hidden.grad is not None:
            state.hidden = hidden.grad

    def _embedding_backward(self, state: PieceState, stack: int) -> None:
        """What lies below the first layer of a stack: its embedding, and what the stack before gave."""
        if self.requires.embeddings[stack]:
            with calling(state.call):
                self._embedded(state, stack)[0].backward(state.hidden)  # type: ignore[no-untyped-call]
        gradient = None if state.source is None else _take_gradient(state.source)
        if gradient is not None:
            state.hidden = gradient
        state.source = None

    def _penalty(self, number: int | None) -> Tensor | None:
        """() float32: the penalties of the adapter's parts in one layer, or (None) outside all of them."""
        return total_penalty(self._adapters[number])


def _take_gradient(side: SideInput) -> Tensor | None:
    """The gradient that the layers above left; the sum goes on from it as a root of the next graph."""
    if side.value is None:
        return None
    gradient, side.value.grad = side.value.grad, None
    return gradient


def _stages_of(base: LoadedModel) -> Stages:
    """Raises: ModelError for a base that nobody has compared layer by layer; plan refuses it before."""
    stages = base.family.stages(base.net)
    if stages is None:
        what = f"{base.facts.model_type} cannot be computed layer by layer"
        raise ModelError(what, "write memory.streaming: off", key="memory.streaming")
    return stages


def make_engine(
    seed: int, slots: LayerSlots | None, pass_micro_batches: int, splitting: Splitting | None = None
) -> WindowEngine:
    """The engine of a run: layer by layer if the base's layers are in slots, else micro-batch by micro-batch."""
    if slots is None:
        return WindowEngine(seed, splitting)
    return StreamingEngine(seed, slots, pass_micro_batches, splitting)
