"""The interface of a model: its outputs, how it is called, and its stages for layer-by-layer execution."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tunekit.contracts.rows import Batch, Pixels, Processor, Progress, Tensors, Tokenizer
from tunekit.records import ModelFacts

Modules = Mapping[str, torch.nn.Module]  # by name
NamedModules = list[tuple[str, torch.nn.Module]]
Sums = Tensors  # float64, of any shape; added up over batches and ranks
ROW_LOSSES = "row losses"  # entries of Sums that are concatenated: (rows,) the loss of each row
ROW_MARGINS = "row margins"  # (rows,) by how much the row's own label (or its worst token) beats all others
ROW_RIGHT = "rows right"  # (rows,) 1 where all labels of the row are predicted right, else 0


@dataclass
class Loss:
    """The loss of a micro-batch. `total`: the sum of the losses of its units (tokens, labels, pairs), (K,) float32 with
    gradient."""

    total: Tensor
    metrics: Sums = field(default_factory=dict)  # sums of logged values over the units, without gradient


class Head(Protocol):
    """The output projection of a text model, including its scale and soft cap. It may be tied, quantized or adapted."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The float32 logits: (N, D) -> (N, V)."""


@dataclass(frozen=True)
class ModelOutput:
    """The output of a forward: the `hidden` states and the `head` that computes logits from them; or each row's
    `logits`, if the model computes these itself."""

    hidden: Tensor | None = None  # (B, T, D)
    head: Head | None = None
    head_parameters: Sequence[Tensor] = ()  # trained parameters inside the head
    chunk_tokens: int = 1  # positions per call of the head
    logits: Tensor | None = None  # (B, C)
    companion_head: Head | None = None  # the output projection of the companion that has one


Read = Callable[[ModelOutput, Batch], Tensor]  # a function that computes values from the output of a batch
# How many of these values belong to each of the batch's sequences: first sequence of all rows, second of all rows ...
Counts = Callable[[Batch], Sequence[int]]


@dataclass(frozen=True)
class Sampling:
    """How the next token of an answer is chosen: at temperature 0 the most likely token, otherwise a random token.
    `top_k` 0: no limit. `min_p`: the minimum probability of a token, as a share of that of the most likely token. The
    penalties change the logits of tokens that occurred before, also at temperature 0. `logit_bias`: (id, number to add
    to its logit).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or a bias change the model's logits."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


GREEDY = Sampling()


@dataclass(frozen=True)
class AnswerLimits:
    """How answers are generated: maximum length, batch size, sampling, and a chat template if it differs from the
    tokenizer's."""

    max_new_tokens: int = 128
    batch_size: int = 8
    template: str | None = None
    sampling: Sampling = GREEDY


class BaseFamily(Protocol):
    """What objectives and companions ask the family of a base."""

    def learned_positions(self, net: torch.nn.Module) -> int | None:
        """The number of positions that the base has learned; None if positions are computed."""

    def head(self, net: torch.nn.Module) -> Head:
        """The output projection."""


class LoadedBase(Protocol):
    """The interface of a loaded base (model.loaded_model.LoadedModel), with or without weights."""

    net: torch.nn.Module
    dtype: torch.dtype
    facts: ModelFacts

    @property
    def family(self) -> BaseFamily: ...


class Model(Protocol):
    """The interface of a base with its adapter, called by losses, answers and companions."""

    reference_scores: dict[bytes, Tensor]  # cached by the loss, by row
    repeats_rows: bool  # whether the run has more than one epoch

    @property
    def base(self) -> LoadedBase: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def virtual_tokens(self) -> int:
        """The number of positions that the adapter puts before each row."""

    def output(self, inputs: Tensors) -> ModelOutput:
        """The output of one forward."""

    def stop_ids(self, tokenizer: Tokenizer, template: str | None) -> list[int]:
        """The ids that end an answer. `template`: a chat template, if it is not the tokenizer's."""

    def adapt_inputs(self, inputs: Tensors) -> Tensors:
        """The inputs, extended by an adapter that acts on the whole model (virtual tokens). Generation calls this for
        its first forward only."""

    def training_mode(self, training: bool) -> AbstractContextManager[None]:
        """A context manager: train mode or eval mode inside the block."""


@dataclass(frozen=True)
class Answering:
    """The functions and settings by which a model answers prompts. They depend on the objective.

    `kind`: the kind of answer: text, label, score or picture. `write`: answers prompts. `score`: scores sequences of
    ids.
    `draw`: generates images (H, W, 3) from prompts and seeds. `report_pictures`: generates images for a report.
    `generation`: generation settings to write into a merged model; a value of None removes a setting.
    `normalize`: normalises a text for metrics that ignore spelling. `processor`: the processor with the recipe's
    changes, to save with a merged model.
    """

    kind: str
    write: Callable[[Model, Sequence[Any], AnswerLimits], list[str]] | None = None
    score: Callable[[Model, Sequence[Sequence[int]], int], list[float]] | None = None
    draw: Callable[[Model, Sequence[str], Sequence[int], Progress], list[Pixels]] | None = None
    report_pictures: Callable[[Model, Progress], list[Pixels]] | None = None
    labels: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    normalize: Callable[[str], str] = str
    processor: Processor | None = None


@dataclass(eq=False)
class SideInput:
    """A tensor that layers read besides the hidden states, for one micro-batch: an encoder's output, or the output of
    an earlier layer (T5's position biases). The engine sets `value` to an autograd leaf."""

    value: Tensor | None = None


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a layer besides its hidden states, for one micro-batch.

    `arguments` and `keywords`: positional and keyword arguments, in which a SideInput stands for a tensor.
    `side_outputs`: a SideInput for each output of the layer after the first, in order; None for an output that no layer
    reads. `added`: what the model adds to the hidden states before this layer (B, T, D).
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    side_outputs: tuple[SideInput | None, ...] = ()
    added: torch.Tensor | None = None

    @property
    def side_inputs(self) -> list[SideInput]:
        """The side inputs that the layer reads, without duplicates."""
        values = (*self.arguments, *self.keywords.values())
        return list({id(value): value for value in values if isinstance(value, SideInput)}.values())


@dataclass(frozen=True)
class Stack:
    """Consecutive layers, each called as `layer(hidden, call)` -> hidden (B, T, D). The last layer includes the final
    norm.

    `embed(inputs, source)` returns the first hidden states and each layer's LayerCall. `source`: the output of the
    previous stack; None for the first stack.
    """

    embed: Callable[[Tensors, SideInput | None], tuple[Tensor, list[LayerCall]]]
    layers: Sequence[torch.nn.Module]


@dataclass(frozen=True)
class Stages:
    """A model divided into stacks for layer-by-layer execution: a single stack, or an encoder's stack and a
    decoder's stack."""

    stacks: Sequence[Stack]

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The layers of all stacks in order."""
        return [layer for stack in self.stacks for layer in stack.layers]

    @property
    def stack_at(self) -> dict[int, int]:
        """A mapping from the index of each stack's first layer to the index of the stack."""
        counts = [len(stack.layers) for stack in self.stacks]
        return {sum(counts[:number]): number for number in range(len(counts))}
