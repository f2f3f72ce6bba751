"""What rooms of one level know of each other: Tokenizer, Processor, Row, Batch, Window, Loss, Objective and so on.

Typing, numpy, torch, records.  Letters: B batch, T tokens, D hidden, V vocabulary, I/O in/out, R rank, K adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.records import Preparation

AT_STEP_0, TEACHER = "policy at step 0", "teacher"  # what an objective may compare with
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

    def encode_with_offsets(
        self, text: str, *, special_tokens_in_text: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and their [start, end) character offsets in `text`."""

    def encode_source(self, text: str) -> list[int]:
        """Ids of a whole text for an encoder, with the special tokens that the tokenizer puts around one."""

    def encode_answer(self, text: str) -> list[int]:
        """Ids of a whole text for a decoder to learn, likewise."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`."""

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        """Messages through the chat template (or `template`), as text. Raises DataError where the template refuses."""

    def token_text(self, token_id: int) -> str:
        """One token as a person reads it."""


class Processor(Protocol):
    """What turns an example into a row: a tokenizer, or what reads recordings or images, with a tokenizer beside it or
    without one."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides a row."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of its texts; a tokenizer's own self."""

    def save(self, folder: Path) -> None:
        """Write its files into a model folder."""


@dataclass(frozen=True)
class RowLayout:
    """What a row of an objective is made of: its parts and their dtypes, which of them hold token ids, and how many
    sizes it has. `paired`: each of these is a line of one tensor, and as wide as the widest where it is padded.

    `token_sizes`: the places of those sizes that count tokens, None: of all; others count frames or pixels.
    `least`: to what each size is padded at least, where a model takes no less.
    `told_by`: parts beside the ids by which equal rows are known.
    `alike`: the part that is the same in all rows of a micro-batch, where rows of another one make no tensor with them.
    """

    parts: Mapping[str, str]
    token_parts: tuple[str, ...]
    sizes: int
    paired: bool = False
    token_sizes: tuple[int, ...] | None = None
    least: tuple[int, ...] = ()
    told_by: tuple[str, ...] = ()
    alike: str | None = None

    def padded(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """A sequence's sizes as the padding of a micro-batch sees them."""
        found = (max(sizes),) * len(sizes) if self.paired else tuple(sizes)
        return tuple(map(max, found, self.least)) if self.least else found

    def length(self, sizes: Sequence[int]) -> int:
        """Of what data.max_length bounds in a row: its tokens."""
        counted = self.tokens_of(sizes)
        return max(counted, default=0) if self.paired else sum(counted)

    def tokens_of(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Those of the sizes that count tokens."""
        return tuple(sizes) if self.token_sizes is None else tuple(sizes[place] for place in self.token_sizes)

    def kind(self, row: Row) -> bytes:
        """Equal for rows that may share a micro-batch."""
        return b"" if self.alike is None else row.parts[self.alike].tobytes()


@dataclass(frozen=True, eq=False)
class Row:
    """One encoded row. `sizes`: of each part that is padded by itself; `supervised`: what the loss sums over in it."""

    parts: Mapping[str, NDArray[Any]]
    sizes: tuple[int, ...]
    supervised: int
    origin: str  # "train.jsonl:17", for errors and preview
    number: int = 0  # its index in Rows

    @property
    def size(self) -> int:
        """Of all parts together, padding excluded."""
        return sum(self.sizes)


class Rows(Protocol):
    """Random access to encoded rows; small enough an interface for a memory map."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(rows, sizes) of each row's parts."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) the sizes of each row, added up."""

    @property
    def supervised(self) -> NDArray[np.int64]:
        """(rows,) what the loss sums over in each row."""


@dataclass(frozen=True)
class Part:
    """Token ids of a row as preview shows them, and which of them are trained on; none of what is no text, of which
    the title says what it is."""

    ids: NDArray[Any]  # (T,)
    trained: NDArray[np.bool_]  # (T,)
    title: str = ""  # written before it
    image: NDArray[np.uint8] | None = None  # (H, W, 3) as it is seen, of what is one


class RowEncoder(Protocol):
    """Examples to rows of one objective; counts in `notices` what the user should know."""

    notices: Counter[str]

    def examples(self, example: Any) -> Sequence[Any]:
        """What rows are made of where one example takes several; else the example itself."""

    def encode(self, example: Any, origin: str) -> Row:
        """The row. Raises: Dropped where nothing can be trained on; DataError where the row is wrong."""

    def prompt(self, example: Any) -> tuple[Any, str] | None:
        """What is asked, for the objective's `answer` (of text, ids up to where the answer begins), and the answer's
        text; None where there is none."""

    def question(self, text: str) -> Any:
        """What is asked where a user writes `text`, which names a file where rows are no texts."""

    def shown(self, asked: Any) -> str:
        """What is asked, as a person reads it."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of whole rows: what the network is called with, what the loss reads, and the rows themselves.
    `sequences[b]`: the rows that lie end to end in line b of the tensors; one each where every row is padded alone."""

    inputs: dict[str, torch.Tensor]  # each (B, ...)
    targets: dict[str, torch.Tensor]
    sequences: tuple[tuple[Row, ...], ...]
    line_size: int | None = None  # of one sequence with its padding, where that is not a count of ids

    @property
    def rows(self) -> list[Row]:
        """Every row."""
        return [row for sequence in self.sequences for row in sequence]

    @property
    def lengths(self) -> list[int]:
        """(B,) sizes of each sequence, without padding."""
        return [sum(row.size for row in sequence) for sequence in self.sequences]

    @property
    def tokens(self) -> int:
        """Sizes of all rows, without padding."""
        return sum(self.lengths)

    @property
    def supervised(self) -> int:
        """What the loss sums over."""
        return sum(row.supervised for row in self.rows)

    @property
    def width(self) -> int:
        """Of one sequence with its padding, all of its parts together."""
        return self.padded // len(self.sequences)

    @property
    def padded(self) -> int:
        """Positions of all sequences with their padding."""
        if self.line_size is not None:
            return self.line_size * len(self.sequences)
        return sum(tensor.numel() for name, tensor in self.inputs.items() if name.endswith("input_ids"))


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step (of this rank), with their indices in the step over all ranks."""

    step: int  # 0-based index of the optimizer step
    epoch: float  # epochs finished after this step
    indices: tuple[int, ...]
    batches: tuple[Batch, ...]
    seed: int = 0  # of what is drawn for it
    preparation: Preparation = field(default_factory=Preparation)


Sums = dict[str, torch.Tensor]  # float64, of any shape; what is added up over batches and ranks
ROW_LOSSES = "row losses"  # the one among sums that is laid end to end instead: (rows,) the loss of each of the batch
Gather = Callable[[list[Any]], list[Any]]  # plain values of this rank -> those of every rank
Told = Callable[[str, int, int], None]  # what, how many are done, of how many: for a line of progress


@dataclass
class Loss:
    """`total`: SUM of the per-unit losses, (K,) float32 with gradient; `per_step`: averaged over micro-batches."""

    total: torch.Tensor
    per_step: torch.Tensor | None = None
    metrics: Sums = field(default_factory=dict)  # sums over the units of what is logged, without gradient


class Head(Protocol):
    """The output projection of a text model, with its scale and soft cap; may be tied, quantized or adapted."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V) in float32."""


@dataclass(frozen=True)
class ModelOutput:
    """What a forward gives: hidden states with the head that reads them, or the logits of a head that reads rows."""

    hidden: torch.Tensor | None = None  # (B, T, D)
    head: Head | None = None
    head_parameters: Sequence[torch.Tensor] = ()  # trained ones inside the head
    chunk_tokens: int = 1  # positions that pass the head at a time
    logits: torch.Tensor | None = None  # (B, C)
    teacher_head: Head | None = None  # that reads the hidden states of a teacher, where there is one


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen: the likeliest at temperature 0, else drawn. `top_k` 0: of all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


GREEDY = Sampling()


class Objective(Protocol):
    """What is minimised. It owns its rows, and never makes a forward of its own outside `prepare`."""

    name: str
    family: str
    example: str  # the kind of example that it learns from, as formats give it
    packable: bool  # whether several rows may lie end to end in one sequence
    reference: str  # none, AT_STEP_0 or TEACHER
    layout: RowLayout
    metrics: Sequence[str]  # always measured
    logged: Sequence[str]  # of each step, as its Loss sums them up
    complete: bool  # whether it knows what its base and its loss need; else its rows tell
    facts: Mapping[str, Any]  # beside its settings: plain values that its adapter's folder keeps
    repeats: int  # steps in a row that have the same rows; only before the first of them can a run be gone on with
    fingerprint: str  # sha256 of everything of it that decides a row
    notes: Sequence[str]  # what its rows told, for the user
    generation: Mapping[str, Any]  # of a merged model's generation settings, None: to be taken out

    def section(self, model: Any, seed: int = 0) -> Any:
        """The recipe's model section as the base is loaded for this objective."""

    def row_encoder(self, options: Any) -> RowEncoder:
        """What encodes examples with these options of the data section. Raises: RecipeError for a senseless one."""

    def informed(self, rows: Sequence[Rows], template: str | None = None) -> Objective:
        """The same objective with what only all of its rows tell; `template`: by which their prompts were written."""

    def held_out(self) -> Objective:
        """The same objective as it measures rows that it does not learn from, but for what `measuring` adds."""

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """What lies at sizes start .. stop-1 of a row."""

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """Rows of so large a size together as one sequence can hold, `part` of them as large as it can be."""

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """The batch whose sequence b holds the rows sequences[b]."""

    def normalized(self, text: str) -> str:
        """A text as metrics compare it that do not count spellings."""

    def spans(self, row: Row) -> list[Part]:
        """What preview shows of a row."""

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> Objective:
        """The same objective for a model that keeps documents of one sequence apart, or for one that does not;
        `shares_prefixes`: whether a document may begin with tokens of another one, which are computed there."""

    def shared(self, row: Row) -> int:
        """How many of a row's tokens are computed once that its sizes count twice."""

    def begin(self, model: Any, rows: Sequence[Rows], told: Told) -> Mapping[str, str]:
        """Make what all steps need of the base: before the first of them, and again before the first after a resume,
        which is refused where what this gives (by key, sha256 of files that were read) is another."""

    def parts_beside(self, model: Any) -> list[torch.nn.Module]:
        """Modules beside the net that lie on the device with it while `begin` and `pictures` run."""

    def rehearse(self, model: Any, batch: Batch) -> None:
        """With a model without values: what `begin` and `pictures` do with its parts beside the net, for one row."""

    def pictures(self, model: Any, told: Told) -> list[NDArray[np.uint8]]:
        """What the model draws for the report, (H, W, 3) each, always from the same prompts and seeds."""

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """The window with all that depends on the step; without gradient. `gather`: where all ranks' shares decide."""

    def measuring(self, model: Any, rows: Rows, batches: Iterable[Batch], gather: Gather) -> Objective:
        """The same objective with what all evaluation rows decide together; `batches`: this rank's, of all `rows`."""

    def units(self, batch: Batch) -> torch.Tensor:
        """(K,) float64: what the step's loss is divided by, known before the forward."""

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Sum over the batch's units."""

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """What metrics are made of, and ROW_LOSSES, which add up to its `loss`; no gradient."""

    def answer(
        self,
        model: Any,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int,
        batch_size: int,
        template: str | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The text that the model gives to each prompt, made with `template`, None being the tokenizer's own."""


class Engine(Protocol):
    """Runs forward and backward of one window and leaves the summed gradient, divided by `units`, in place."""

    loss_scale: float
    losses: list[torch.Tensor]  # the sum of each micro-batch of the last window

    def run_window(
        self, model: Any, objective: Objective, window: Window, units: torch.Tensor, micro_batches: int = 1
    ) -> tuple[torch.Tensor, Sums]:
        """Returns (K,) float64 loss sum of this rank divided by `units`, and the sums of what is logged;
        `micro_batches`: how many the step has over all ranks; per-step terms are averaged over them."""


@dataclass(eq=False)
class SideInput:
    """A tensor that layers read beside their hidden states, for one micro-batch: an encoder's output, or what an
    earlier layer gave (T5's position biases). Whoever runs the layers sets `value`, a leaf for those that read it."""

    value: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerCall:
    """What one layer is called with after its hidden states, for one micro-batch.
    `arguments` and `keywords` hold a SideInput in place of each tensor that is one.  `side_outputs`: what the layer
    gives after its hidden states, in order; None where no layer reads it."""

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
    before, None for the first."""

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
