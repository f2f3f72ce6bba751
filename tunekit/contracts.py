"""What rooms of one level know of each other: Tokenizer, rows, Batch, Window, Loss, Objective, Engine, Stages.

Typing, numpy and torch only.  Letters: B batch, T tokens, D hidden, V vocabulary, I/O in/out, R rank, K adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

IGNORED = -100  # a label that is never predicted, as in torch's cross_entropy


class Tokenizer(Protocol):
    """A tokenizer as data and objectives see it. No method ever adds special tokens of its own accord."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int  # any existing id: padding is always masked by length, never by id
    adds_bos: bool  # whether the tokenizer by itself puts bos_id before a text; encode never does
    special_ids: frozenset[int]  # control tokens
    vocabulary_size: int
    fingerprint: str  # sha256 of everything that changes ids or templates
    chat_template: str | None
    answer_start_id: int | None  # with which the decoder of an encoder-decoder begins; None: one sequence holds all

    def encode(self, text: str, *, special_tokens_in_text: bool = True) -> list[int]:
        """Ids of `text`; with special_tokens_in_text=False, text that spells a special token is encoded as text."""
        ...

    def encode_with_offsets(
        self, text: str, *, special_tokens_in_text: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and their [start, end) character offsets in `text`."""
        ...

    def encode_source(self, text: str) -> list[int]:
        """Ids of a whole text for an encoder, with the special tokens that the tokenizer puts around one."""
        ...

    def encode_answer(self, text: str) -> list[int]:
        """Ids of a whole text for a decoder to learn, likewise."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`."""
        ...

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        """Messages through the chat template (or `template`), as text. Raises DataError where the template refuses."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token as a person reads it."""
        ...


@dataclass(frozen=True)
class EncodedRow:
    """One row ready to train on. `trained[t]` says whether token t is a target (the first token never counts).

    Of an encoder-decoder: the source, the token with which an answer begins, the answer; that alone is trained on.
    """

    ids: NDArray[np.int32]  # (T,)
    trained: NDArray[np.bool_]  # (T,)
    origin: str  # "train.jsonl:17", for errors and preview

    @property
    def supervised_tokens(self) -> int:
        """Targets that a causal model predicts: trained[1:], for token 0 is never predicted."""
        return int(self.trained[1:].sum())


class EncodedRows(Protocol):
    """Random access to encoded rows; small enough an interface for a memory map."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EncodedRow: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) tokens of each row."""
        ...

    @property
    def supervised(self) -> NDArray[np.int64]:
        """(rows,) supervised tokens of each row."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch, right-padded. Rows are whole rows, or packs of rows when `packed`.

    Position ids restart at 0 for each segment of a pack and for the padding tail; there is no attention mask, since
    padding comes after every real token and a causal model never looks ahead.
    """

    input_ids: torch.Tensor  # (B, T) int64
    position_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64; IGNORED where not trained, and at the first token of each segment
    lengths: tuple[int, ...]  # (B,) real tokens of each row
    packed: bool
    origins: tuple[tuple[str, ...], ...]  # for each of the B rows, the origins of its segments
    row_ids: tuple[tuple[int, ...], ...]  # the same as indices into EncodedRows

    @property
    def tokens(self) -> int:
        """Non-padding tokens."""
        return sum(self.lengths)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that a causal model is trained to predict; the first of a row never is."""
        return int((self.labels[:, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step (of this rank), with their indices in the step over all ranks."""

    step: int  # 0-based index of the optimizer step
    epoch: float  # epochs finished after this step
    indices: tuple[int, ...]
    batches: tuple[Batch, ...]


@dataclass
class Loss:
    """`total`: SUM of the per-unit losses, (K,) float32 with gradient; `per_step`: averaged over micro-batches."""

    total: torch.Tensor
    per_step: torch.Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Head(Protocol):
    """The output projection of a text model, with its scale and soft cap; may be tied, quantized or adapted."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V) in float32."""
        ...


class Objective(Protocol):
    """What is minimised. It never makes a forward of its own outside `prepare`."""

    family: str
    packable: bool
    needs_reference: bool

    def prepare(self, model: Any, window: Window) -> Window: ...

    def units(self, batch: Batch) -> torch.Tensor:
        """(K,) float64: what the step's loss is divided by, known before the forward."""
        ...

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the network is called with."""
        ...

    def loss(
        self, output: torch.Tensor, head: Head, batch: Batch, head_parameters: Sequence[torch.Tensor] = ()
    ) -> Loss:
        """Sum over the batch's units; `output` is hidden states (B, T, D) for text families.

        `head_parameters`: trained parameters inside the head. Without gradient, metrics counts `correct` targets too.
        """
        ...


class Engine(Protocol):
    """Runs forward and backward of one window and leaves the summed gradient, divided by `units`, in place."""

    loss_scale: float
    losses: list[torch.Tensor]  # the sum of each micro-batch of the last window

    def run_window(
        self, model: Any, objective: Objective, window: Window, units: torch.Tensor, micro_batches: int = 1
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns (K,) float64 loss sum of this rank divided by `units`, and metrics.

        `micro_batches`: how many the step has over all ranks; per-step terms are averaged over them.
        """
        ...


@dataclass(eq=False)
class SideInput:
    """A tensor that layers read beside their hidden states, for one micro-batch: an encoder's output, or what an
    earlier layer gave (T5's position biases). Whoever runs the layers sets `value`, a leaf for those that read it.
    """

    value: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerCall:
    """What one layer is called with after its hidden states, for one micro-batch.

    `arguments` and `keywords` hold a SideInput in place of each tensor that is one.  `side_outputs`: what the layer
    gives after its hidden states, in order; None where no layer reads it.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    side_outputs: tuple[SideInput | None, ...] = ()

    @property
    def side_inputs(self) -> list[SideInput]:
        """What the layer reads of others, each once."""
        values = (*self.arguments, *self.keywords.values())
        return list({id(value): value for value in values if isinstance(value, SideInput)}.values())


@dataclass(frozen=True)
class Stack:
    """Layers that follow one another, each `layer(hidden, call)` -> hidden (B, T, D); the last one's includes the
    stack's final norm.

    `embed(inputs, source)` gives the first hidden state and each layer's call; `source` is the output of the stack
    before, None for the first.
    """

    embed: Callable[[dict[str, torch.Tensor], SideInput | None], tuple[torch.Tensor, list[LayerCall]]]
    layers: Sequence[torch.nn.Module]


@dataclass(frozen=True)
class Stages:
    """A model cut for layer-by-layer execution: one stack, or an encoder's and then its decoder's."""

    stacks: Sequence[Stack]

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The layers of all stacks in order."""
        return [layer for stack in self.stacks for layer in stack.layers]

    @property
    def stack_at(self) -> dict[int, int]:
        """Number of a stack's first layer -> number of that stack."""
        counts = [len(stack.layers) for stack in self.stacks]
        return {sum(counts[:number]): number for number in range(len(counts))}


class WindowSource(Protocol):
    """Windows in training order, from a given step on; a pure function of (rows, settings, seed)."""

    steps: int

    def windows(self, first_step: int) -> Iterator[Window]: ...
