"""A loaded base with its adapter, as engines, evaluation and generation call it: inputs in, hidden states out."""

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
from tunekit.machine.placing import placed
from tunekit.memory.offload import BoundaryStore
from tunekit.memory.slots import LayerSlots
from tunekit.memory.vocabulary import HeadParts, StreamedHead
from tunekit.model.attention.segments import Segments, find_segments
from tunekit.model.call import Call, calling, current_call
from tunekit.model.families.structure import training_mode
from tunekit.model.load import LoadedModel
from tunekit.model.text.generation import generate_texts
from tunekit.objectives.losses.logprobs import logits_chunk_tokens


@dataclass
class TunedModel:
    """The network with its adapter in place (`adapter` None: the bare base)."""

    base: LoadedModel
    adapter: AttachedAdapter | None
    boundaries: BoundaryStore = field(default_factory=lambda: BoundaryStore(None))  # of recomputed layers' inputs
    slots: LayerSlots | None = None  # of a streamed base
    chunk_tokens: int = 0  # positions that pass the head at a time; 0: as many as the vocabulary allows
    head_parts: HeadParts | None = None  # of an output projection that is streamed
    reference_state: Tensors | None = None  # the adapter's at step 0, where the base alone is another policy
    reference_scores: dict[bytes, Tensor] = field(default_factory=dict)  # of rows whose reference scores a loss keeps
    companions: Mapping[str, Companion] = field(default_factory=dict)  # of the objective, by key

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.base.device

    def output(self, inputs: Tensors) -> ModelOutput:
        """What the objective reads; where positions restart, another row begins."""
        with calling(self.call_for(inputs)):
            output = self.base.family.forward(self.base.net, self.entering(inputs))
        if output.logits is not None:
            return replace(output, logits=self.leaving(output.logits))
        assert output.hidden is not None
        return self.finished(self.leaving(output.hidden))

    def scored(
        self, batches: Sequence[Batch], score: Callable[[ModelOutput, Batch], Tensor], *, reference: bool = False
    ) -> list[Tensor]:
        """What `score` makes of each batch, on the host, without gradient or dropout; `reference`: by the policy at
        step 0. A streamed base's layers are copied once for all batches."""
        policy = self._at_step_0() if reference else nullcontext()
        with torch.no_grad(), self.training_mode(False), policy, self.unchanged_weights():
            single = (self.output(batch.inputs) for batch in batches)
            outputs = single if self.slots is None else self._by_layer(batches)
            found = [score(output, batch) for output, batch in zip(outputs, batches, strict=True)]
        return [torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.cpu() for value in found]

    def keep_reference(self) -> None:
        """Keep the adapter's state as that of the policy at step 0."""
        assert self.adapter is not None
        self.reference_state = {name: tensor.clone() for name, tensor in self.adapter.state().items()}

    @contextmanager
    def _at_step_0(self) -> Iterator[None]:
        """A block in which the model is the policy at step 0: with the state kept of it, else the base alone."""
        kept = self.reference_state
        if kept is None or self.adapter is None:
            with calling(replace(current_call(), bypassed=True)):
                yield
        else:
            with self.adapter.holding(kept):
                yield

    def _by_layer(self, batches: Sequence[Batch]) -> Iterator[ModelOutput]:
        """What the objective reads of each batch, every layer computing all of them before the next."""
        stages = self.base.family.stages(self.base.net)
        assert self.slots is not None
        assert stages is not None  # plan refuses to stream such a base
        (stack,) = stages.stacks
        states, last = [], len(stack.layers) - 1
        for batch in batches:
            with calling(self.call_for(batch.inputs)) as call:
                states.append((call, *stack.embed(self.entering(batch.inputs), None)))
        for number, layer in enumerate(stack.layers):
            with self.slots.holding(number, min(number + 1, last)):
                for place, (call, hidden, calls) in enumerate(states):
                    with calling(call):
                        states[place] = call, layer(hidden, calls[number]), calls
        return (self.finished(self.leaving(hidden)) for _, hidden, _ in states)

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
        """The ids with which the model goes on after each prompt, up to a stop id, which is the last of them; `seeds`:
        one for each prompt, which decides what is drawn. Of a model without values all are as long as can be."""
        if self.device.type == "meta":
            return [[int(prompt[-1])] * max_new_tokens for prompt in prompts]
        whole = None if self.adapter is None else self.adapter.model_adapter  # which changes what enters
        with self.unchanged_weights():
            return generate_texts(
                self.base,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                sampling=sampling,
                stop_ids=stop_ids,
                adapt=None if whole is None else self.adapted,
                virtual_tokens=self.virtual_tokens,
                seeds=seeds,
                keep_stop=True,
            )

    def finished(self, hidden: Tensor) -> ModelOutput:
        """What the objective reads of last hidden states (B, T, D)."""
        text = self.base.text
        chunk = self.chunk_tokens or logits_chunk_tokens(1 if text is None else text.vocabulary_size)
        head = self.base.family.head(self.base.net)
        heads = {key: each.head for key, each in self.companions.items() if each.head is not None}
        if self.head_parts is not None:
            return ModelOutput(hidden, StreamedHead(head, self.head_parts), (), chunk, companion_heads=heads)
        return ModelOutput(hidden, head, self.head_parameters(), chunk, companion_heads=heads)

    def hidden(self, inputs: Tensors) -> Tensor:
        """Last hidden states (B, T, D) after the final norm; where positions restart, another document begins."""
        with calling(self.call_for(inputs)):
            return self.leaving(self.base.family.hidden(self.base.net, self.entering(inputs)))

    def call_for(self, inputs: Tensors) -> Call:
        """The current call with the documents of these inputs."""
        return replace(current_call(), segments=self._segments(inputs))

    def entering(self, inputs: Tensors) -> Tensors:
        """What the base is called with, on the device; recordings and images in the dtype in which it computes."""
        there = {name: placed(tensor, self.device) for name, tensor in inputs.items()}
        floats = {name: each.to(self.base.dtype) for name, each in there.items() if each.is_floating_point()}
        return self.adapted(there | floats)

    def leaving(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D), or logits, of the real positions."""
        return hidden if self.adapter is None else self.adapter.outputs(hidden)

    def _segments(self, inputs: Tensors) -> Segments | None:
        """The documents of the rows; None for rows with a mask of their own."""
        if "position_ids" not in inputs or "attention_mask" in inputs:
            return None
        return find_segments(inputs["position_ids"], masked=bool(self.virtual_tokens))

    def adapted(self, inputs: Tensors) -> Tensors:
        """What the network is called with; in generation, for the first step."""
        return inputs if self.adapter is None else self.adapter.inputs(inputs)

    @property
    def virtual_tokens(self) -> int:
        """Positions that the adapter puts before each row."""
        return 0 if self.adapter is None else self.adapter.virtual_tokens

    def own_logits(self, inputs: Tensors) -> Tensor:
        """The network's own logits (B, T, V), whole: for a few tokens only."""
        return self.leaving(self.base.family.logits(self.base.net, self.entering(inputs)))

    def unchanged_weights(self) -> AbstractContextManager[None]:
        """A block in which no trained weight changes, so that each is cast to the compute dtype once."""
        return nullcontext() if self.adapter is None else self.adapter.casts.kept()

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """A block after whose failure no layer's input is kept: torch's queue may hold on to a graph that broke."""
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
        """Trained parameters inside the head, whose gradient is taken chunk by chunk with the loss."""
        name = self.base.family.head_name(self.base.net)
        if self.adapter is None or name is None:
            return []
        inside = self.base.net.get_submodule(name).parameters()
        return [parameter for parameter in inside if parameter.requires_grad]

    def training_mode(self, training: bool) -> AbstractContextManager[None]:
        """Train or eval mode inside the block; every module's own mode is put back after it."""
        return training_mode(self.base.net, training)


@dataclass
class ModelRun:
    """A RunView over one model; its companions are the model's."""

    model: Model
    rows: RowKind
    gather: Gather = list
    progress: Progress = no_progress

    @property
    def is_simulated(self) -> bool:
        """Whether the model is on the meta device, without values."""
        return self.model.device.type == "meta"

    def score(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """What `read` takes from the model's forward of each batch, on the host, without gradient or dropout."""
        return self.model.scored(batches, read)

    def reference(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """The same of the policy at step 0."""
        return self.model.scored(batches, read, reference=True)

    def companion(self, key: str) -> Companion:
        """The loaded companion with this key."""
        return self.model.companions[key]
