"""A loaded base with its adapter. Training engines, evaluation and generation call it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.contracts import (
    GREEDY,
    Batch,
    Companion,
    Gather,
    Model,
    ModelOutput,
    Progress,
    Read,
    RowKind,
    Sampling,
    Tensors,
    Tokenizer,
    no_progress,
)
from tunekit.machine.placing import to_device
from tunekit.memory.offload import BoundaryStore
from tunekit.memory.slots import LayerSlots
from tunekit.memory.vocabulary import HeadParts, StreamedHead
from tunekit.model.attention.padding_free import real_tokens
from tunekit.model.attention.segments import Segments, find_segments
from tunekit.model.call import Call, calling, current_call
from tunekit.model.families.structure import training_mode
from tunekit.model.load import LoadedModel
from tunekit.model.text.generation import generate_texts
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
    head_parts: HeadParts | None = None  # of a streamed output projection
    # the adapter's state at step 0, if the base alone is not the policy at step 0
    reference_state: Tensors | None = None
    reference_scores: dict[bytes, Tensor] = field(default_factory=dict)  # cached by the loss, by row
    repeats_rows: bool = False  # whether the run has more than one epoch
    companions: Mapping[str, Companion] = field(default_factory=dict)  # of the objective, by key

    @property
    def device(self) -> torch.device:
        """The device of inputs."""
        return self.base.device

    def output(self, inputs: Tensors) -> ModelOutput:
        """Compute the output that the objective reads. A row can contain several documents: a new document begins where
        positions restart."""
        with calling(self.call_for(inputs)):
            output = self.base.family.forward(self.base.net, self.prepare_inputs(inputs))
        if output.logits is not None:
            return replace(output, logits=self.real_positions(output.logits))
        assert output.hidden is not None
        return self.to_output(self.real_positions(output.hidden))

    def score_batches(
        self, batches: Sequence[Batch], score: Callable[[ModelOutput, Batch], Tensor], *, reference: bool = False
    ) -> list[Tensor]:
        """Call `score` with the model's output for each batch, without gradient or dropout. Returns the results on the
        host. `reference`: use the policy at step 0. A streamed base copies its layers once for all batches."""
        policy = self.at_step_0() if reference else nullcontext()
        with torch.no_grad(), self.training_mode(False), policy, self.unchanged_weights():
            single = (self.output(batch.inputs) for batch in batches)
            outputs = single if self.slots is None else self._by_layer(batches)
            scores = [score(output, batch) for output, batch in zip(outputs, batches, strict=True)]
        return [torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.cpu() for value in scores]

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
        sampling. On the meta device, all answers have the maximum length."""
        if self.device.type == "meta":
            return [[int(prompt[-1])] * max_new_tokens for prompt in prompts]
        model_adapter = None if self.adapter is None else self.adapter.model_adapter  # it changes the inputs
        with self.unchanged_weights():
            return generate_texts(
                self.base,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                sampling=sampling,
                stop_ids=stop_ids,
                adapt=None if model_adapter is None else self.adapt_inputs,
                virtual_tokens=self.virtual_tokens,
                seeds=seeds,
                keep_stop=True,
            )

    def to_output(self, hidden: Tensor) -> ModelOutput:
        """Make the output for objectives from the last hidden states (B, T, D)."""
        text = self.base.text
        chunk = self.chunk_tokens or logits_chunk_tokens(1 if text is None else text.vocabulary_size)
        head = self.base.family.head(self.base.net)
        heads = {key: companion.head for key, companion in self.companions.items() if companion.head is not None}
        if self.head_parts is not None:
            return ModelOutput(hidden, StreamedHead(head, self.head_parts), (), chunk, companion_heads=heads)
        return ModelOutput(hidden, head, self.head_parameters(), chunk, companion_heads=heads)

    def hidden(self, inputs: Tensors) -> Tensor:
        """Last hidden states (B, T, D) after the final norm. A row can contain several documents: a new document begins
        where positions restart."""
        with calling(self.call_for(inputs)):
            return self.real_positions(self.base.family.hidden(self.base.net, self.prepare_inputs(inputs)))

    def call_for(self, inputs: Tensors) -> Call:
        """The current Call, with the boundaries of documents or of padding in these inputs."""
        real = None if self.virtual_tokens else real_tokens(inputs)
        return replace(current_call(), segments=self._segments(inputs), real_tokens=real)

    def prepare_inputs(self, inputs: Tensors) -> Tensors:
        """Prepare inputs for the network: move them to the device, cast recordings and images to the compute dtype, and
        apply the adapter's changes."""
        moved = {name: to_device(tensor, self.device) for name, tensor in inputs.items()}
        floats = {name: tensor.to(self.base.dtype) for name, tensor in moved.items() if tensor.is_floating_point()}
        return self.adapt_inputs(moved | floats)

    def real_positions(self, hidden: Tensor) -> Tensor:
        """Remove the positions of the adapter's virtual tokens from hidden states (B, T, D) or logits."""
        return hidden if self.adapter is None else self.adapter.outputs(hidden)

    def _segments(self, inputs: Tensors) -> Segments | None:
        """The boundaries of documents in the rows; None if the inputs have a mask or no positions."""
        if "position_ids" not in inputs or "attention_mask" in inputs:
            return None
        return find_segments(inputs["position_ids"], masked=bool(self.virtual_tokens))

    def adapt_inputs(self, inputs: Tensors) -> Tensors:
        """Apply the adapter's changes to the inputs of a forward. In generation, this is done only for the first
        step."""
        return inputs if self.adapter is None else self.adapter.inputs(inputs)

    @property
    def virtual_tokens(self) -> int:
        """The number of virtual tokens that the adapter puts before each row."""
        return 0 if self.adapter is None else self.adapter.virtual_tokens

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
    as a teacher."""

    model: Model
    rows: RowKind
    gather: Gather = list
    progress: Progress = no_progress

    @property
    def is_simulated(self) -> bool:
        """Whether the model is on the meta device."""
        return self.model.device.type == "meta"

    def score(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Run a forward of each batch without gradient or dropout. Returns the values that `read` takes from each
        output, on the host."""
        return self.model.score_batches(batches, read)

    def reference(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Like `score`, but with the policy at step 0."""
        return self.model.score_batches(batches, read, reference=True)

    def companion(self, key: str) -> Companion:
        """The loaded companion with this key."""
        return self.model.companions[key]
