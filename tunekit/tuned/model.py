"""A loaded base with its adapter. Training engines, evaluation and generation call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.contracts import (
    GREEDY,
    Batch,
    Companion,
    CompanionType,
    Counts,
    Gather,
    LayerCall,
    ModelOutput,
    Progress,
    Read,
    RowKind,
    Sampling,
    Stages,
    StepBatches,
    Tensors,
    Tokenizer,
    no_progress,
)
from tunekit.errors import is_out_of_memory
from tunekit.machine.placing import to_device
from tunekit.memory.offload import BoundaryStore
from tunekit.memory.slots import LayerSlots
from tunekit.memory.splitting import collect_failed, compute_in_parts, document_too_large, first_line
from tunekit.memory.vocabulary import StreamedHead
from tunekit.model.attention.real_tokens import real_tokens
from tunekit.model.attention.segments import find_segments
from tunekit.model.call import Call, calling, current_call
from tunekit.model.families.routers import make_router_loss, record_routers
from tunekit.model.families.structure import training_mode
from tunekit.model.load import LoadedModel
from tunekit.model.router_loss import RouterLoss
from tunekit.model.text.generation import find_stop_ids, generate_texts
from tunekit.objectives.losses.logprobs import logits_chunk_tokens


@dataclass
class TunedModel:
    """A network with its attached adapter. `adapter` None: the base without an adapter."""

    base: LoadedModel
    adapter: AttachedAdapter | None
    # stores the inputs of recomputed layers
    boundaries: BoundaryStore = field(default_factory=lambda: BoundaryStore(None))
    slots: LayerSlots | None = None  # for a streamed base
    chunk_tokens: int = 0  # positions per call of the head; 0: limited by the vocabulary
    streamed_head: StreamedHead | None = None
    # the adapter's state at step 0, if the base alone is not the policy at step 0
    reference_state: Tensors | None = None
    reference_scores: dict[bytes, Tensor] = field(default_factory=dict)  # cached by the loss, by row
    repeats_rows: bool = False  # whether the run has more than one epoch
    companions: Mapping[str, Companion] = field(default_factory=dict)  # of the objective, by key
    stages: Stages | None = None  # of a streamed base, once it has run
    router_loss: RouterLoss | None = None  # of a mixture of experts
    requires: RequiresGrad | None = None  # of a streamed base, recorded by its first step

    @property
    def device(self) -> torch.device:
        """The device of inputs."""
        return self.base.device

    def set_router_loss(self, setting: str | float) -> None:
        """Let training steps add the router loss of a mixture of experts. `setting`: of the recipe."""
        self.router_loss = make_router_loss(self.base, setting)
        if self.router_loss is not None:
            record_routers(self.base.net)

    def output(self, inputs: Tensors) -> ModelOutput:
        """Compute the output that the objective reads. A row can contain several documents: a new document begins where
        positions restart."""
        with calling(self.call_for(inputs)):
            output = self.base.family.forward(self.base.net, self.prepare_inputs(inputs))
        if output.logits is not None:
            return replace(output, logits=self.real_positions(output.logits))
        assert output.hidden is not None
        return self.to_output(self.real_positions(output.hidden))

    @contextmanager
    def scoring(self, *, reference: bool = False) -> Iterator[None]:
        """Context manager for `scores`: without gradient or dropout. `reference`: use the policy at step 0."""
        policy = self.at_step_0() if reference else nullcontext()
        with torch.no_grad(), self.training_mode(False), policy, self.unchanged_weights():
            yield

    def scores(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """The values that `read` computes from the output of each batch, on the device. A streamed base copies its
        layers once for all batches."""
        single = (self.output(batch.inputs) for batch in batches)
        outputs = single if self.slots is None else self._by_layer(batches)
        return [read(output, batch) for output, batch in zip(outputs, batches, strict=True)]

    def keep_reference(self) -> None:
        """Save the current state of the adapter as the reference policy (the policy at step 0)."""
        assert self.adapter is not None
        self.reference_state = {name: tensor.clone() for name, tensor in self.adapter.state().items()}

    @contextmanager
    def at_step_0(self) -> Iterator[None]:
        """Context manager: the model is the policy at step 0. This is the adapter with the saved state, or the base
        without adapter if no state was saved."""
        state = self.reference_state
        if state is None or self.adapter is None:
            with calling(replace(current_call(), bypassed=True)):
                yield
        else:
            with self.adapter.with_state(state):
                yield

    def _by_layer(self, batches: Sequence[Batch]) -> Iterator[ModelOutput]:
        """Yield the output of each batch. Each layer computes all batches before the next layer is needed."""
        stages = self.base.family.stages(self.base.net)
        assert self.slots is not None
        assert stages is not None  # plan refuses to stream such a base
        (stack,) = stages.stacks
        states, last = [], len(stack.layers) - 1
        for batch in batches:
            with calling(self.call_for(batch.inputs)) as call:
                states.append((call, *stack.embed(self.prepare_inputs(batch.inputs), None)))
        for number, layer in enumerate(stack.layers):
            with self.slots.holding(number, min(number + 1, last)):
                for place, (call, hidden, calls) in enumerate(states):
                    with calling(call):
                        states[place] = call, layer(hidden, calls[number]), calls
        return (self.to_output(self.real_positions(hidden)) for _, hidden, _ in states)

    def to_output(self, hidden: Tensor) -> ModelOutput:
        """Make the output for objectives from the last hidden states (B, T, D)."""
        text = self.base.text
        chunk = self.chunk_tokens or logits_chunk_tokens(1 if text is None else text.vocabulary_size)
        heads = (companion.head for companion in self.companions.values())
        other = next((each for each in heads if each is not None), None)
        if self.streamed_head is not None:
            return ModelOutput(hidden, self.streamed_head, (), chunk, companion_head=other)
        family = self.base.family
        head = None if family.headless else family.head(self.base.net)
        return ModelOutput(hidden, head, self.head_parameters(), chunk, companion_head=other)

    def hidden(self, inputs: Tensors) -> Tensor:
        """Last hidden states (B, T, D) after the final norm. A row can contain several documents: a new document begins
        where positions restart."""
        with calling(self.call_for(inputs)):
            return self.real_positions(self.base.family.hidden(self.base.net, self.prepare_inputs(inputs)))

    def call_for(self, inputs: Tensors) -> Call:
        """The current Call, with the boundaries of documents or of padding in these inputs."""
        segments, real = None, None if self.virtual_tokens else real_tokens(inputs)
        if "position_ids" in inputs and "attention_mask" not in inputs:
            segments = find_segments(inputs["position_ids"], masked=bool(self.virtual_tokens))
        return replace(current_call(), segments=segments, real_tokens=real)

    def prepare_inputs(self, inputs: Tensors) -> Tensors:
        """Prepare inputs for the network: move them to the device, cast recordings and images to the compute dtype, and
        apply the adapter's changes."""
        moved = {name: to_device(tensor, self.device) for name, tensor in inputs.items()}
        floats = {name: tensor.to(self.base.dtype) for name, tensor in moved.items() if tensor.is_floating_point()}
        return self.adapt_inputs(moved | floats)

    def real_positions(self, hidden: Tensor) -> Tensor:
        """Remove the positions of the adapter's virtual tokens from hidden states (B, T, D) or logits."""
        return hidden if self.adapter is None else self.adapter.outputs(hidden)

    def adapt_inputs(self, inputs: Tensors) -> Tensors:
        """Apply the adapter's changes to the inputs of a forward. In generation, this is done only for the first
        step."""
        return inputs if self.adapter is None else self.adapter.inputs(inputs)

    @property
    def virtual_tokens(self) -> int:
        """The number of virtual tokens that the adapter puts before each row."""
        return 0 if self.adapter is None else self.adapter.virtual_tokens

    def stop_ids(self, tokenizer: Tokenizer, template: str | None) -> list[int]:
        """The ids that end an answer. `template`: a chat template, if it is not the tokenizer's."""
        return find_stop_ids(self.base, tokenizer, template)

    def own_logits(self, inputs: Tensors) -> Tensor:
        """The logits (B, T, V) that the network itself computes, not in chunks. This needs much memory for many
        tokens."""
        return self.real_positions(self.base.family.logits(self.base.net, self.prepare_inputs(inputs)))

    def unchanged_weights(self) -> AbstractContextManager[None]:
        """Context manager for code that changes no trained weight. Each weight is cast to the compute dtype only
        once."""
        return nullcontext() if self.adapter is None else self.adapter.casts.caching()

    @contextmanager
    def clearing_on_failure(self) -> Iterator[None]:
        """Context manager: if the block fails, release the stored layer inputs, because torch may keep the failed graph
        in memory."""
        try:
            yield
        except BaseException:
            self.boundaries.clear()
            raise

    def clear_gradient(self) -> None:
        """Zero the gradient, in place."""
        for parameter in self.adapter.trained().values() if self.adapter else ():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def head_parameters(self) -> list[Tensor]:
        """Trained parameters inside the head. Their gradient is computed in chunks, together with the loss."""
        name = self.base.family.head_name(self.base.net)
        if self.adapter is None or name is None:
            return []
        inside = self.base.net.get_submodule(name).parameters()
        return [parameter for parameter in inside if parameter.requires_grad]

    def training_mode(self, training: bool) -> AbstractContextManager[None]:
        """Context manager: switch to train or eval mode, and restore the mode of each module afterwards."""
        return training_mode(self.base.net, training)


@dataclass
class ModelRun:
    """A model as objectives see it during a run (a RunView). Companions are other models that the objective needs, such
    as a teacher.

    If memory runs out in `score`, `reference` or `generate`, they compute less at once. Nothing else is repeated, and
    no values are exchanged, so the other ranks need not know it. `on_split` is called with the size that ran out.
    """

    model: TunedModel
    rows: RowKind
    gather: Gather = list
    progress: Progress = no_progress
    on_split: Callable[[str], None] = lambda size: None

    @property
    def is_simulated(self) -> bool:
        """Whether the model is on the meta device."""
        return self.model.device.type == "meta"

    def score(self, batches: Sequence[Batch], read: Read, counts: Counts | None = None) -> list[Tensor]:
        """The values that `read` computes from each batch's forward, on the host, without gradient or dropout.

        `counts`: how many values each sequence has; None: 1 each, so S values for each of P rows are (S P, ...).
        Raises: ResourceError if a single document does not fit into memory.
        """
        return self._score(batches, read, counts, reference=False)

    def reference(self, batches: Sequence[Batch], read: Read, counts: Counts | None = None) -> list[Tensor]:
        """Like `score`, but with the policy at step 0."""
        return self._score(batches, read, counts, reference=True)

    def _score(self, batches: Sequence[Batch], read: Read, counts: Counts | None, *, reference: bool) -> list[Tensor]:
        # The layers of a streamed base are copied once for all batches that are computed together.
        together = [[batch] for batch in batches] if self.model.slots is None else [batches]
        in_parts = partial(
            compute_in_parts,
            compute=partial(self.model.scores, read=read),
            join=partial(_joined, counts=counts),
            kind=self.rows,
            on_split=self.on_split,
        )
        with self.model.scoring(reference=reference):
            scores = [score for some in together for score in in_parts(some)]
        return [torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.cpu() for value in scores]

    def generate(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int,
        stop_ids: Sequence[int],
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Generate token ids for each prompt, including the stop id that ends an answer. `seeds`: one per prompt, for
        sampling. In a simulation, all answers have the maximum length.

        If memory runs out, all prompts are continued again, half as many at once. Their seeds do not depend on it.
        Raises: ResourceError if a single prompt does not fit into memory.
        """
        if self.is_simulated:
            return [[int(prompt[-1])] * max_new_tokens for prompt in prompts]
        model, adapter = self.model, self.model.adapter
        changes_inputs = adapter is not None and adapter.model_adapter is not None
        while True:
            try:
                with model.unchanged_weights():
                    return generate_texts(
                        model.base,
                        tokenizer,
                        prompts,
                        max_new_tokens=max_new_tokens,
                        batch_size=batch_size,
                        sampling=sampling,
                        stop_ids=stop_ids,
                        adapt=model.adapt_inputs if changes_inputs else None,
                        virtual_tokens=model.virtual_tokens,
                        seeds=seeds,
                        keep_stop=True,
                    )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Not inside `except`: the error keeps the failed attempt's tensors alive there.
            size = min(batch_size, len(prompts))
            if size < 2:
                raise document_too_large(None, reason)
            self.on_split(f"a batch of {size:,} completions")
            collect_failed()
            batch_size = size // 2

    def score_step(self, step: StepBatches, read: Read) -> list[Tensor]:
        """Only a training step has a later forward. Raises: NotImplementedError."""
        raise NotImplementedError("only a training step is scored as its later forward computes it")

    def is_one_part(self, step: StepBatches) -> bool:
        """Whether the step is a single micro-batch."""
        return len(step.batches) == 1

    def gather_rows(self, step: StepBatches, values: Sequence[Tensor]) -> Tensor:
        """The rows of all ranks, on the host of every rank, in the order of the step's micro-batches.

        Shapes: `values`, one tensor (rows, ...) for each micro-batch of this rank -> (all rows, ...).
        """
        # A copy, because a view would be sent with the whole tensor that it is a view of.
        local = [tensor.detach().cpu().clone() for tensor in values]
        numbered = self.gather(list(zip(step.indices, local, strict=True)))
        return torch.cat([tensor for _, tensor in sorted(numbered, key=lambda pair: pair[0])])

    def companion(self, protocol: type[CompanionType]) -> CompanionType:
        """The loaded companion that has this protocol."""
        (companion,) = (each for each in self.model.companions.values() if isinstance(each, protocol))
        return companion


def _joined(halves: Sequence[Batch], values: Sequence[Tensor], counts: Counts | None) -> Tensor:
    """The values of a batch from those of its halves. The order of values is: the first sequence of every row, the
    second sequence of every row, and so on; so the halves alternate."""
    sizes = [
        [1] * len(value) if counts is None else [*counts(half)] for half, value in zip(halves, values, strict=True)
    ]
    parts = [torch.split(value, size) for value, size in zip(values, sizes, strict=True)]
    rows = [len(half.rows) for half in halves]
    sides = range(len(parts[0]) // rows[0])  # S sequences for each row
    return torch.cat(
        [
            part
            for side in sides
            for some, count in zip(parts, rows, strict=True)
            for part in some[side * count :][:count]
        ]
    )


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
