"""The layer-by-layer engine: several micro-batches run through one layer before the next layer is loaded. So weights
are copied twice per group of micro-batches, not twice per micro-batch.

Gradients equal those of the engine for weights on the device (engine.py). They are equal bit for bit if each trained
tensor belongs to one layer; otherwise sums have a different order.

The forward builds no graph and stores each layer's input. The backward recomputes each layer from its stored input,
with a graph for that layer alone. Source of this order: Pudipeddi et al. 2020 (L2L), arXiv 2002.05645.
An encoder's output stays on the device while the decoder's layers run, because each layer reads it. Gradients of such
side inputs are summed in the same order as in a single graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import repeat, zip_longest
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.attach import total_penalty
from tunekit.contracts import LayerCall, Read, SideInput, Stages, Tensors
from tunekit.errors import ModelError
from tunekit.machine.cpu_times import cpu_times
from tunekit.memory.splitting import collect_failed, first_line
from tunekit.model.call import BETWEEN_STACKS, OUTSIDE_LAYERS, Call, calling, seed_layer
from tunekit.model.quantized.weights import UNPACKED
from tunekit.training.engine import Engine, MicroBatchPart, StepAttempt, StepResult, StepWork
from tunekit.tuned.model import RequiresGrad, TunedModel


@dataclass(eq=False)
class PartState:
    """The state of one part of a step between two layers."""

    part: MicroBatchPart
    call: Call
    inputs: Tensors  # the network's inputs
    hidden: Tensor = field(init=False)  # (B, T, D) after the last layer so far; in the backward pass, its gradient
    source: SideInput | None = None  # (B, S, D) the previous stack's output
    calls: list[LayerCall] = field(default_factory=list)  # calls of the layers of all stacks so far


class StreamingEngine(Engine):
    """Runs steps layer by layer. If several runs over one base are given, they take turns in each layer, so that it is
    loaded and unpacked once for all runs. Each result has the same bits as alone. `warn`: prints a warning."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn, self._apart = warn, False

    def run(self, works: Sequence[StepWork]) -> list[StepResult]:
        """Run the works together. After any error, each of them runs alone, and what it raises alone is its result. If
        the error was no work's own, they stay apart."""
        if len(works) < 2 or self._apart:
            return super().run(works)
        attempts, started = list(map(StepAttempt, works)), cpu_times()
        try:
            with ExitStack() as blocks:
                for attempt in attempts:
                    blocks.enter_context(attempt.work.model.unchanged_weights())
                    blocks.enter_context(attempt.work.model.clearing_on_failure())
                    blocks.enter_context(attempt.watching())
                _run_groups(attempts, unpacks_once=True)
            times = cpu_times().since(started)
            return [attempt.result(times) for attempt in attempts]
        except Exception as error:
            reason = first_line(error) or type(error).__name__
        attempts.clear()
        collect_failed()  # not inside `except`: the error keeps the failed attempt's tensors alive there
        for work in works:
            work.model.clear_gradient()
        limits = [work.splitting and work.splitting.tokens for work in works]
        results = super().run(works)
        split = limits != [work.splitting and work.splitting.tokens for work in works]
        if not split and all(result.error is None for result in results):
            self._apart = True
            self._warn(f"the trials cannot run together ({reason}); from now on, their steps run one after another")
        return results

    def _compute(self, attempt: StepAttempt) -> None:
        _run_groups([attempt])

    def _read_outputs(self, attempt: StepAttempt, read: Read) -> Iterator[Tensor]:
        for parts in _groups(attempt):
            layer_pass = LayerPass(attempt, parts, reads_only=True)
            count = len(layer_pass.layers)
            for number in range(count):
                layer_pass.embed(number)
                with layer_pass.slots.holding(number, (number + 1) % count):
                    layer_pass.forward(number)
            yield from layer_pass.read(read)


def _groups(attempt: StepAttempt) -> list[list[MicroBatchPart]]:
    """The parts that pass through each layer together."""
    parts, size = attempt.parts, attempt.work.micro_batches_per_pass
    return [parts[start : start + size] for start in range(0, len(parts), size)]


def _run_groups(attempts: Sequence[StepAttempt], *, unpacks_once: bool = False) -> None:
    """Run all parts of these attempts, one group of each attempt at a time."""
    for groups in zip_longest(*map(_groups, attempts)):
        passes = [LayerPass(attempt, parts) for attempt, parts in zip(attempts, groups, strict=True) if parts]
        run_passes(passes, unpacks_once=unpacks_once)
        for each in passes:  # only after success: a failed pass has not recorded all
            each.attempt.work.model.requires = each.requires


class LayerPass:
    """Runs some parts of an attempt through all layers: forward and, unless it `reads_only`, backward. The first pass
    of a model records with its first part which hidden states require a gradient."""

    def __init__(self, attempt: StepAttempt, parts: Sequence[MicroBatchPart], *, reads_only: bool = False) -> None:
        self.attempt, self.model = attempt, attempt.work.model
        assert self.model.slots is not None
        self.slots, stages = self.model.slots, _stages_of(self.model)
        self.stacks, self.layers, self.stack_at = stages.stacks, stages.layers, stages.stack_at
        known = RequiresGrad.nowhere(stages) if reads_only else self.model.requires
        self.requires, records = known or RequiresGrad(), known is None
        self.store = self.model.boundaries
        self._adapters: dict[int | None, list[Any]] = defaultdict(list)
        numbers = {module: number for number, layer in enumerate(self.layers) for module in layer.modules()}
        for each in self.model.adapter.parts() if self.model.adapter else []:
            self._adapters[numbers.get(each)].append(each)
        self.states = [
            self._begin(attempt.call(part) if reads_only else attempt.training_call(part), part) for part in parts
        ]
        self._recorded = self.states[0] if records else None

    def _begin(self, call: Call, part: MicroBatchPart) -> PartState:
        """The state of a part before the first layer."""
        with calling(call):
            return PartState(part, self.model.call_for(part.batch.inputs), part.batch.inputs)

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
            self.attempt.computing(state.part)
            hidden = state.hidden.requires_grad_(self.requires.layers[-1])
            state.hidden = self._head_gradient(state, hidden)

    def read(self, read: Read) -> Iterator[Tensor]:
        """Yields the values that `read` computes from the output of every micro-batch."""
        for state in self.states:
            self.attempt.computing(state.part)
            with calling(state.call):
                output = self.model.to_output(self.model.real_positions(state.hidden))
                yield self.attempt.read(state.part, output, read)

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
            stack = self.stack_at[number]
            self.attempt.computing(state.part)
            if self.requires.embeddings[stack]:
                with calling(state.call):
                    self._run_embedding(state, stack)[0].backward(state.hidden)  # type: ignore[no-untyped-call]
            gradient = None if state.source is None else _take_gradient(state.source)
            if gradient is not None:  # the stack reads an encoder's output: continue with its gradient
                state.hidden = gradient
            state.source = None

    def finish(self) -> None:
        """Free stored layer inputs that no backward pass needs. Only the micro-batch that recorded `requires` has such
        inputs."""
        for state in self.states:
            for number in range(len(self.layers)):
                self.store.drop((id(state), number))

    def _embed(self, state: PartState, number: int, recording: bool) -> None:
        """Compute the embedding before the first layer of a stack (encoder or decoder)."""
        if number > 0:
            state.source = SideInput(state.hidden.requires_grad_(self.requires.layers[number - 1]))
        with calling(state.call), torch.set_grad_enabled(recording):
            hidden, calls = self._run_embedding(state, self.stack_at[number])
        if recording:
            self.requires.embeddings.append(hidden.requires_grad)
        state.hidden = hidden.detach()
        state.calls += calls

    def _run_embedding(self, state: PartState, stack: int) -> tuple[Tensor, list[LayerCall]]:
        """Returns the stack's first hidden state (B, T, D), and the arguments with which the model calls each layer of
        the stack."""
        seed_layer(state.call, OUTSIDE_LAYERS)
        inputs = self.model.prepare_inputs(state.inputs)
        if stack > 0:
            seed_layer(state.call, BETWEEN_STACKS)
        return self.stacks[stack].embed(inputs, state.source)

    def _layer_forward(self, state: PartState, number: int, recording: bool) -> None:
        """Run one layer. Its input is stored if the backward pass will recompute the layer."""
        self.attempt.computing(state.part)
        if recording or self.requires.layers[number]:
            self.store.put((id(state), number), state.hidden, stays=number == len(self.layers) - 1)
        call = state.calls[number]
        with torch.set_grad_enabled(recording):
            hidden = self._run_layer(state, number, state.hidden)
        if state.call.routing is not None:
            with torch.no_grad():
                state.call.routing.add()
        if recording:
            self.requires.record(number, self.stack_at.get(number), hidden, call)
        needs = self.requires.side_outputs[number] if self.requires.side_outputs else repeat(False)
        for side, needed in zip(call.side_outputs, needs, strict=False):
            if side is not None and side.value is not None:
                side.value = side.value.detach().requires_grad_(needed)
        state.hidden = hidden.detach()

    def _run_layer(self, state: PartState, number: int, hidden: Tensor) -> Tensor:
        """The hidden state (B, T, D) after one layer."""
        with calling(state.call):
            seed_layer(state.call, number)
            if state.call.routing is not None:
                state.call.routing.record()
            output: Tensor = self.layers[number](hidden, state.calls[number])
        return output

    def _head_gradient(self, state: PartState, hidden: Tensor) -> Tensor:
        """Run the head and the loss forward and backward. Returns the gradient (B, T, D) of the loss with respect to
        the last hidden states."""
        with calling(state.call):
            output = self.model.to_output(self.model.real_positions(hidden))
            self.attempt.backward(state.part, output, lambda: self._penalty(None))
        return hidden.grad if hidden.grad is not None else hidden.detach()

    def _layer_backward(self, state: PartState, number: int, next_key: tuple[int, int]) -> None:
        """Recompute one layer and compute the gradients of its parameters. If a layer below is trained, also compute
        the gradients of its inputs."""
        self.attempt.computing(state.part)
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
        routing = state.call.routing
        for penalty in (self._penalty(number), None if routing is None else routing.layer_loss()):
            if penalty is None or not penalty.requires_grad:
                continue
            value = penalty / state.part.divisor * self.attempt.work.loss_scale
            roots.append((value, torch.ones_like(penalty)))
        pairs = [(root, gradient) for root, gradient in roots if root is not None and gradient is not None]
        torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])
        self.store.drop(key)
        for side in outputs:
            side.value = None
        if hidden.grad is not None:
            state.hidden = hidden.grad

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


def _stages_of(model: TunedModel) -> Stages:
    """The base's stacks of layers, for layer-by-layer execution. Raises: ModelError for a base that was not tested this
    way; plan refuses such a base earlier."""
    base, model.stages = model.base, model.stages or model.base.family.stages(model.base.net)
    if model.stages is None:
        what = f"{base.facts.model_type} cannot be computed layer by layer"
        raise ModelError(what, "write memory.streaming: off", key="memory.streaming")
    return model.stages


def make_engine(model: TunedModel, warn: Callable[[str], None] = lambda text: None) -> Engine:
    """The engine for a model: layer by layer if its layers are copied to the device one by one."""
    return Engine() if model.slots is None else StreamingEngine(warn)
