"""The layer-by-layer engine: several micro-batches run through one layer before the next layer is loaded. So weights
are copied twice per group of micro-batches, not twice per micro-batch.

Gradients equal those of the engine for weights on the device (window.py). They are equal bit for bit if each trained
tensor belongs to one layer; otherwise sums have a different order.

The forward builds no graph and stores each layer's input. The backward recomputes each layer from its stored input,
with a graph for that layer alone. Source of this order: Pudipeddi et al. 2020 (L2L), arXiv 2002.05645.
An encoder's output stays on the device while the decoder's layers run, because each layer reads it. Gradients of such
side inputs are summed in the same order as in a single graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.attach import total_penalty
from tunekit.contracts import LayerCall, Read, SideInput, Stages, Tensors
from tunekit.errors import ModelError
from tunekit.memory.slots import LayerSlots
from tunekit.memory.splitting import Splitting
from tunekit.model.call import BETWEEN_STACKS, OUTSIDE_LAYERS, Call, calling, seed_layer
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import UNPACKED
from tunekit.training.engines.window import Piece, WindowEngine, WindowRun


@dataclass(eq=False)
class PieceState:
    """The state of one piece (a micro-batch, or a part of a split micro-batch) between two layers."""

    piece: Piece
    call: Call
    inputs: Tensors  # the network's inputs
    hidden: Tensor = field(init=False)  # (B, T, D) after the last layer so far; in the backward pass, its gradient
    source: SideInput | None = None  # (B, S, D) the previous stack's output
    calls: list[LayerCall] = field(default_factory=list)  # calls of the layers of all stacks so far


@dataclass
class RequiresGrad:
    """Records which hidden states depend on trained parameters, and so require a gradient. The values are recorded
    while the first micro-batch runs."""

    embeddings: list[bool] = field(default_factory=list)  # of each stack
    layers: list[bool] = field(default_factory=list)  # of each layer's output
    side_outputs: list[list[bool]] = field(default_factory=list)  # of each layer

    @staticmethod
    def nowhere(stages: Stages) -> RequiresGrad:
        """No hidden state requires a gradient, because there is no backward pass."""
        return RequiresGrad([False] * len(stages.stacks), [False] * len(stages.layers))

    def before(self, number: int, stack: int | None) -> bool:
        """Whether this layer's input requires a gradient. `stack`: the index of the stack (encoder or decoder) that
        starts with this layer; None if no stack starts here."""
        return self.layers[number - 1] if stack is None else self.embeddings[stack]

    def record(self, number: int, stack: int | None, hidden: Tensor, call: LayerCall) -> None:
        """Record whether a layer's output requires a gradient. `hidden`: the output, computed with a graph for this
        layer alone."""
        self.layers.append(self.before(number, stack) or hidden.requires_grad)
        values = [None if side is None else side.value for side in call.side_outputs]
        self.side_outputs.append([value is not None and value.requires_grad for value in values])


class StreamingEngine(WindowEngine):
    """Runs the forward and backward of a window (the micro-batches of one optimizer step). `micro_batches_per_pass`
    micro-batches pass through each layer together."""

    def __init__(
        self, seed: int, slots: LayerSlots, micro_batches_per_pass: int, splitting: Splitting | None = None
    ) -> None:
        super().__init__(seed, splitting)
        self.slots, self.micro_batches_per_pass = slots, micro_batches_per_pass
        self._stages: Stages | None = None
        self._requires: RequiresGrad | None = None

    def _run(self, run: WindowRun, pieces: Sequence[Piece]) -> None:
        for layer_pass in self.passes(run, pieces):
            run_passes([layer_pass])

    def _read_outputs(self, run: WindowRun, pieces: Sequence[Piece], read: Read) -> Iterator[Tensor]:
        stages = self._stages = self._stages or _stages_of(run.model.base)
        for start in range(0, len(pieces), self.micro_batches_per_pass):
            some = pieces[start : start + self.micro_batches_per_pass]
            layer_pass = LayerPass(run, stages, self.slots, some, RequiresGrad.nowhere(stages))
            for number in range(len(stages.layers)):
                layer_pass.embed(number)
                with self.slots.holding(number, (number + 1) % len(stages.layers)):
                    layer_pass.forward(number)
            yield from layer_pass.read(read)

    def passes(self, run: WindowRun, pieces: Sequence[Piece]) -> Iterator[LayerPass]:
        """Yields a LayerPass for each group of `micro_batches_per_pass` pieces. Run each pass before you take the next
        one."""
        self._stages = self._stages or _stages_of(run.model.base)
        for start in range(0, len(pieces), self.micro_batches_per_pass):
            some = pieces[start : start + self.micro_batches_per_pass]
            layer_pass = LayerPass(run, self._stages, self.slots, some, self._requires)
            yield layer_pass
            self._requires = layer_pass.requires  # only after success: a failed attempt has not recorded all


class LayerPass:
    """Runs several micro-batches (`pieces`) forward and backward through all layers.

    `requires`: which hidden states require a gradient, as an earlier LayerPass recorded it. None: record it with the
    first micro-batch.
    """

    def __init__(
        self, run: WindowRun, stages: Stages, slots: LayerSlots, pieces: Sequence[Piece], requires: RequiresGrad | None
    ) -> None:
        self.run, self.slots = run, slots
        self.stacks, self.layers, self.stack_at = stages.stacks, stages.layers, stages.stack_at
        self.requires, self.records = requires or RequiresGrad(), requires is None
        self.store = run.model.boundaries
        self._adapters: dict[int | None, list[Any]] = defaultdict(list)
        numbers = {module: number for number, layer in enumerate(self.layers) for module in layer.modules()}
        for part in run.model.adapter.parts() if run.model.adapter else []:
            self._adapters[numbers.get(part)].append(part)
        self.states = [self._begin(piece) for piece in pieces]
        self._recorded = self.states[0] if self.records else None

    def _begin(self, piece: Piece) -> PieceState:
        """The state of a micro-batch before the first layer."""
        with calling(self.run.call(piece)):
            return PieceState(piece, self.run.model.call_for(piece.batch.inputs), piece.batch.inputs)

    def embed(self, number: int) -> None:
        """Compute the embeddings of every micro-batch, if a stack (encoder or decoder) starts with this layer."""
        for state in self.states if number in self.stack_at else ():
            self._embed(state, number, state is self._recorded)

    def forward(self, number: int) -> None:
        """Run one layer for every micro-batch, without a graph. While `requires` is being recorded, the first
        micro-batch runs with a graph."""
        for state in self.states:
            self._layer_forward(state, number, state is self._recorded)

    def head(self) -> None:
        """Run the head and the loss of every micro-batch, forward and backward."""
        for state in self.states:
            self.run.computing(state.piece)
            hidden = state.hidden.requires_grad_(self.requires.layers[-1])
            state.hidden = self._head_gradient(state, hidden)

    def read(self, read: Read) -> Iterator[Tensor]:
        """Yields the values that `read` computes from the output of every micro-batch."""
        for state in self.states:
            self.run.computing(state.piece)
            with calling(state.call):
                output = self.run.model.to_output(self.run.model.real_positions(state.hidden))
                yield self.run.read(state.piece, output, read)

    def needs(self, number: int) -> bool:
        """Whether the output of this layer requires a gradient."""
        return number >= 0 and self.requires.layers[number]

    def backward(self, number: int) -> None:
        """Recompute one layer with a graph, and compute its gradients."""
        for state, after in zip(self.states, [*self.states[1:], None], strict=True):
            coming = (id(self.states[0]), number - 1) if after is None else (id(after), number)
            self._layer_backward(state, number, coming)

    def embedding_backward(self, number: int) -> None:
        """Run the backward pass of the embedding, if a stack (encoder or decoder) starts with this layer."""
        for state in self.states if number in self.stack_at else ():
            self._embedding_backward(state, self.stack_at[number])

    def finish(self) -> None:
        """Free stored layer inputs that no backward pass needs. Only the micro-batch that recorded `requires` has such
        inputs."""
        for state in self.states:
            for number in range(len(self.layers)):
                self.store.drop((id(state), number))

    def _embed(self, state: PieceState, number: int, recording: bool) -> None:
        """Compute the embedding before the first layer of a stack (encoder or decoder)."""
        if number > 0:
            state.source = SideInput(state.hidden.requires_grad_(self.requires.layers[number - 1]))
        with calling(state.call), torch.set_grad_enabled(recording):
            hidden, calls = self._run_embedding(state, self.stack_at[number])
        if recording:
            self.requires.embeddings.append(hidden.requires_grad)
        state.hidden = hidden.detach()
        state.calls += calls

    def _run_embedding(self, state: PieceState, stack: int) -> tuple[Tensor, list[LayerCall]]:
        """Returns the stack's first hidden state (B, T, D), and the arguments with which the model calls each layer of
        the stack."""
        seed_layer(state.call, OUTSIDE_LAYERS)
        inputs = self.run.model.prepare_inputs(state.inputs)
        if stack > 0:
            seed_layer(state.call, BETWEEN_STACKS)
        return self.stacks[stack].embed(inputs, state.source)

    def _layer_forward(self, state: PieceState, number: int, recording: bool) -> None:
        """Run one layer. Its input is stored if the backward pass will recompute the layer."""
        self.run.computing(state.piece)
        if recording or self.requires.layers[number]:
            self.store.put((id(state), number), state.hidden, stays=number == len(self.layers) - 1)
        call = state.calls[number]
        with torch.set_grad_enabled(recording):
            hidden = self._run_layer(state, number, state.hidden)
        if recording:
            self.requires.record(number, self.stack_at.get(number), hidden, call)
        needs = self.requires.side_outputs[number] if self.requires.side_outputs else repeat(False)
        for side, needed in zip(call.side_outputs, needs, strict=False):
            if side is not None and side.value is not None:
                side.value = side.value.detach().requires_grad_(needed)
        state.hidden = hidden.detach()

    def _run_layer(self, state: PieceState, number: int, hidden: Tensor) -> Tensor:
        """The hidden state (B, T, D) after one layer."""
        with calling(state.call):
            seed_layer(state.call, number)
            output: Tensor = self.layers[number](hidden, state.calls[number])
        return output

    def _head_gradient(self, state: PieceState, hidden: Tensor) -> Tensor:
        """Run the head and the loss forward and backward. Returns the gradient (B, T, D) of the loss with respect to
        the last hidden states."""
        with calling(state.call):
            output = self.run.model.to_output(self.run.model.real_positions(hidden))
            self.run.backward(state.piece, output, lambda: self._penalty(None))
        return hidden.grad if hidden.grad is not None else hidden.detach()

    def _layer_backward(self, state: PieceState, number: int, next_key: tuple[int, int]) -> None:
        """Recompute one layer and compute the gradients of its parameters. If a layer below is trained, also compute
        the gradients of its inputs."""
        self.run.computing(state.piece)
        key, call = (id(state), number), state.calls[number]
        hidden = self.store.take(key).detach()
        hidden.requires_grad_(self.requires.before(number, self.stack_at.get(number)))
        self.store.prefetch(next_key)
        outputs = [side for side in call.side_outputs if side is not None]
        output_gradients = [_take_gradient(side) for side in outputs]
        roots = [(side.value, _take_gradient(side)) for side in call.side_inputs]
        output = self._run_layer(state, number, hidden)
        roots = [(output, state.hidden), *roots]
        roots += [(side.value, gradient) for side, gradient in zip(outputs, output_gradients, strict=True)]
        penalty = self._penalty(number)
        if penalty is not None:
            value = penalty / state.piece.shares * self.run.engine.loss_scale * self.run.weight
            roots.append((value, torch.ones_like(penalty)))
        pairs = [(root, gradient) for root, gradient in roots if root is not None and gradient is not None]
        torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])
        self.store.drop(key)
        for side in outputs:
            side.value = None
        if hidden.grad is not None:
            state.hidden = hidden.grad

    def _embedding_backward(self, state: PieceState, stack: int) -> None:
        """Run the backward pass of a stack's embedding. If the stack reads an encoder's output, continue with the
        gradient of that output."""
        self.run.computing(state.piece)
        if self.requires.embeddings[stack]:
            with calling(state.call):
                self._run_embedding(state, stack)[0].backward(state.hidden)  # type: ignore[no-untyped-call]
        gradient = None if state.source is None else _take_gradient(state.source)
        if gradient is not None:
            state.hidden = gradient
        state.source = None

    def _penalty(self, number: int | None) -> Tensor | None:
        """() float32: the sum of the adapter's penalty terms in this layer. `number` None: the terms that belong to no
        layer."""
        return total_penalty(self._adapters[number])


def run_passes(passes: Sequence[LayerPass], *, unpacks_once: bool = False) -> None:
    """Run several passes over the same layers together: each layer is loaded once, and then every pass runs it. The
    backward pass ends at the lowest layer that requires a gradient.

    `unpacks_once`: unpack each quantized matrix once in the forward pass and once in the backward pass. This needs
    memory for the unpacked matrices of one layer.
    """
    slots, count = passes[0].slots, len(passes[0].layers)
    unpacked = UNPACKED.caching if unpacks_once else nullcontext
    for number in range(count):
        for each in passes:
            each.embed(number)
        with slots.holding(number, min(number + 1, count - 1)), unpacked():
            for each in passes:
                each.forward(number)
    for each in passes:
        each.head()
    for number in reversed(range(count)):
        running = [each for each in passes if each.needs(number)]
        if not running:
            break
        continues = any(each.needs(number - 1) for each in running)
        with slots.holding(number, number - 1 if continues else 0), unpacked():
            for each in running:
                each.backward(number)
        for each in running:
            each.embedding_backward(number)
    for each in passes:
        each.finish()


def _take_gradient(side: SideInput) -> Tensor | None:
    """Return the gradient of a side input (such as an encoder's output) and clear it. The layers that read the side
    input have computed the gradient; the next backward pass starts from it."""
    if side.value is None:
        return None
    gradient, side.value.grad = side.value.grad, None
    return gradient


def _stages_of(base: LoadedModel) -> Stages:
    """The base's stacks of layers, for layer-by-layer execution. Raises: ModelError for a base that was not tested this
    way; plan refuses such a base earlier."""
    stages = base.family.stages(base.net)
    if stages is None:
        what = f"{base.facts.model_type} cannot be computed layer by layer"
        raise ModelError(what, "write memory.streaming: off", key="memory.streaming")
    return stages


def make_engine(
    seed: int, slots: LayerSlots | None, pass_micro_batches: int, splitting: Splitting | None = None
) -> WindowEngine:
    """Returns the engine of a run. `slots`: device memory for layers that are copied in one by one; None: all weights
    are on the device, so micro-batches run one after another."""
    if slots is None:
        return WindowEngine(seed, splitting)
    return StreamingEngine(seed, slots, pass_micro_batches, splitting)
