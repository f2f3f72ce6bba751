"""Types shared by data and losses: tokenizer, processor, rows, batches, steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts.images import ImageProcessor
from tunekit.errors import DataError, listed
from tunekit.formats.labels import MULTI_LABEL, REGRESSION, LabelValue, label_text, of_cell
from tunekit.records import JsonObject, Preparation

IGNORED = -100  # a label that is never predicted, as in torch's cross_entropy
Tensors = dict[str, Tensor]  # by name
Array = NDArray[Any]
RowParts = Mapping[str, Array]  # the parts of a row, by name
Pixels = NDArray[np.uint8]  # (H, W, 3)
Gather = Callable[[list[Any]], list[Any]]  # plain values of this rank -> those of all ranks
Progress = Callable[[str, int, int], None]  # what is counted, number done, total


def no_progress(what: str, done: int, total: int) -> None:
    """A Progress callback that shows nothing."""


@dataclass(frozen=True)
class Pairing:
    """How a tokenizer joins two texts. `before`, `between`, `after`: the special ids around the texts. `types`: the
    token type ids of the five parts (before, first text, between, second text, after); empty if the model has no token
    types."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[tuple[int, ...], ...] = ()


class Tokenizer(Protocol):
    """The tokenizer interface that data and objectives use. Methods add special tokens only if their docstrings say
    so."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int  # any existing id: padding is always masked by length, never by id
    adds_bos: bool  # whether the tokenizer by default puts bos_id before a text; encode never does
    special_ids: frozenset[int]  # control tokens
    unknown_id: int | None  # the token of unknown characters or words; None if it also has another use, or is absent
    vocabulary_size: int
    fingerprint: str  # sha256 of everything that changes ids or templates
    chat_template: str | None
    answer_start_id: int | None  # the first id of an encoder-decoder's decoder; None for other models
    images: ImageProcessor | None  # None for a base that reads no images

    def encode(self, text: str, *, special_tokens_in_text: bool = True) -> list[int]:
        """The ids of `text`. If special_tokens_in_text is false, names of special tokens in `text` are encoded as plain
        text."""

    def encode_with_offsets(
        self, text: str, *, special_tokens_in_text: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, and the [start, end) character offsets of each id."""

    def encode_source(self, text: str) -> list[int]:
        """The ids of a complete text for an encoder, with the tokenizer's special tokens around the text."""

    def encode_answer(self, text: str) -> list[int]:
        """The ids of a complete answer for a decoder, with the tokenizer's special tokens around the answer."""

    @property
    def pairing(self) -> Pairing:
        """How the tokenizer joins two texts."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`."""

    def render(
        self,
        messages: Sequence[JsonObject],
        *,
        tools: Sequence[JsonObject] | None = None,
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        """Render the messages as text with the chat template, or with `template`. Raises DataError if the template
        fails."""

    def token_text(self, token_id: int) -> str:
        """One token as readable text."""

    def with_images(self, images: ImageProcessor) -> Processor:
        """A copy with this image processor."""


class Processor(Protocol):
    """Turns examples into rows. Either a tokenizer, or a processor of recordings or images, which may include a
    tokenizer."""

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that affects a row."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer for texts; None if there is none. If the processor is itself a tokenizer, it returns itself."""

    def save(self, folder: Path) -> None:
        """Save the processor's files in a model folder."""


@dataclass(frozen=True)
class EncodeOptions:
    """The options of the data section that affect how rows are encoded. `template`: the text of a chat template.
    `image_tokens`: the maximum number of tokens of an image; 0: as the base's processor limits it.
    `image_cache_bytes`: the maximum size of stored features of images, which affects no row; 0: none are stored."""

    train_on: str = "assistant"
    template: str | None = None
    max_length: int = 0
    excess_length: str = "drop"
    rewritten_answers: str = "last"
    reasoning: str = "template"
    image_tokens: int = 0
    image_cache_bytes: int = 0


@dataclass(frozen=True)
class RowLayout:
    """The named arrays (parts) of a row with their dtypes, the parts that contain token ids, and the number of sizes of
    a row.

    `paired`: all sizes are lines of the same tensor, so that each line is padded to the longest line.
    `token_sizes`: the indices of sizes that count tokens; other sizes count frames or pixels. None: all sizes count
    tokens.
    `minimum`: the smallest padded sizes.
    `identity`: names of parts that, together with the ids, identify a row.
    `batch_key`: name of a part that must be equal in all rows of a micro-batch (images of one size, recordings of one
    length).
    `distinct`: name of a part with hashes. No two rows of a step have an equal hash.
    """

    parts: Mapping[str, str]
    token_parts: tuple[str, ...]
    sizes: int
    paired: bool = False
    token_sizes: tuple[int, ...] | None = None
    minimum: tuple[int, ...] = ()
    identity: tuple[str, ...] = ()
    batch_key: str | None = None
    distinct: str | None = None

    def padded(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The sizes of a sequence after padding in its micro-batch."""
        wide = (max(sizes),) * len(sizes) if self.paired else tuple(sizes)
        return tuple(map(max, wide, self.minimum)) if self.minimum else wide

    def length(self, sizes: Sequence[int]) -> int:
        """The number of tokens in these sizes, which data.max_length limits."""
        tokens = self.tokens_of(sizes)
        return max(tokens, default=0) if self.paired else sum(tokens)

    def tokens_of(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The sizes that count tokens."""
        return tuple(sizes) if self.token_sizes is None else tuple(sizes[place] for place in self.token_sizes)

    def key_of(self, row: Row) -> bytes:
        """The row's value of the part `batch_key`. Only rows with equal values can share a micro-batch."""
        return b"" if self.batch_key is None else row.parts[self.batch_key].tobytes()


@dataclass(frozen=True, eq=False)
class Row:
    """One encoded row: named arrays (`parts`). `sizes`: for each part that is padded separately, its number of tokens,
    frames or pixels; `supervised`: the number of units (tokens, labels) whose losses are added."""

    parts: RowParts
    sizes: tuple[int, ...]
    supervised: int
    origin: str  # "train.jsonl:17", for errors and preview
    number: int = 0  # its index in Rows
    occurrence: int = 0  # how many copies of the row are before it in its step, on all ranks

    @property
    def size(self) -> int:
        """Total size of all parts, without padding."""
        return sum(self.sizes)

    def with_parts(self, parts: RowParts) -> Row:
        """A copy of the row with these arrays added."""
        return replace(self, parts={**self.parts, **parts})


class Rows(Protocol):
    """The interface of encoded rows with access by index, for example in a memory-mapped file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    @property
    def sizes(self) -> NDArray[np.int64]:
        """The sizes of all rows, shape (rows, sizes per row)."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The total size of each row, shape (rows,)."""

    @property
    def supervised(self) -> NDArray[np.int64]:
        """The number of supervised units of each row, shape (rows,)."""


def default_labels(count: int) -> tuple[str, ...]:
    """The names that transformers gives to the outputs of a head without named labels: LABEL_0, LABEL_1, ..."""
    return tuple(f"LABEL_{number}" for number in range(count))


@dataclass(frozen=True)
class Labels:
    """The labels of an objective. `names`: the label of each output of the trained head; empty if the labels are not
    known yet. `head`: the labels of the base's own head, if it has one. `pad_id`: the padding id, if the base's
    configuration has none."""

    names: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    pad_id: int | None = None

    @cached_property
    def head_rows(self) -> dict[str, int]:
        """A mapping from labels to outputs (rows) of the head. Keys are the names, and their spellings by `label_text`.
        If the names are transformers' default names, the output's number is a key too."""
        numbers = range(len(self.names))
        spellings = ((label_text(name), number) for number, name in enumerate(self.names))
        by_number = {str(number): number for number in numbers} if self.names == default_labels(len(self.names)) else {}
        return {**by_number, **dict(spellings), **dict(zip(self.names, numbers, strict=True))}

    def head_name(self, label: str) -> str:
        """The name that the head has for a label, which may be given as a number. If the head does not have the label,
        the label is returned unchanged."""
        head_row = self.head_rows.get(label)
        return label if head_row is None else self.names[head_row]

    def check(self, label: str) -> None:
        """Raises: DataError for a label that is not listed."""
        if self.names and label not in self.head_rows:
            what = f"the label '{label}' is not among the labels ({self.text(self.names)})"
            raise DataError(what, "correct the label, leave the row out, or add it to objective.labels before training")

    def numbers(self, labels: Iterable[str]) -> Tensor:
        """The index of each label among the outputs of the head, shape (N,)."""
        return torch.tensor([self.head_rows[label] for label in labels])

    def read(self, value: LabelValue) -> str:
        """Convert the label of an example to the text that its row stores. Raises: DataError for an unlisted label,
        or a value that is not a single class."""
        if isinstance(value, str):
            spelled = None if self.names else of_cell(value)
            if not isinstance(spelled, list):
                self.check(value)
                return value
            value = tuple(spelled)
        several = isinstance(value, tuple)
        texts = isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
        # without the value, so that the rows with this problem are one message
        what = "the label is a list, but this objective.problem_type has one label per row"
        if not several:
            what = "the label is a fractional number, not the name of a class"
        wanted = MULTI_LABEL if texts else REGRESSION
        raise DataError(what, f"to learn such labels, write objective.problem_type: {wanted}")

    def listed_in(self, text: str) -> list[str]:
        """The labels in a text that `read` returned."""
        return [text]

    def written(self, text: str) -> str:
        """Convert the label text of a row to the form in which the model answers."""
        return self.head_name(text)

    def targets(self, texts: Iterable[str]) -> Tensor:
        """The targets of the loss: for each text, the index of its label among the outputs of the head, shape (N,)."""
        return self.numbers(texts)

    @property
    def placeholder(self) -> str:
        """The label text that stands in for a missing label."""
        return self.names[0]

    @staticmethod
    def text(labels: Sequence[str]) -> str:
        """The first few labels as text, for a message."""
        return listed(labels, 8)


@dataclass(frozen=True)
class Span:
    """A part of a row that preview shows under a title: token ids with marks on trained ids, or an image."""

    ids: Array = field(default_factory=lambda: np.zeros(0, np.int64))  # (T,)
    trained: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))  # (T,)
    title: str = ""  # shown before the content
    image: NDArray[np.uint8] | None = None  # (H, W, 3) as the model sees it
    continues: bool = False  # whether tokens of the same sequence come before


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of whole rows: the network's inputs, the loss's targets, and the rows themselves.

    `sequences[b]`: the rows that are packed into line b of the tensors; a single row if each row has its own line.
    """

    inputs: Tensors  # each (B, ...)
    targets: Tensors
    sequences: tuple[tuple[Row, ...], ...]
    line_size: int | None = None  # padded size of one sequence, if it is not a number of ids
    filled: tuple[int, ...] | None = None  # tokens in each line of the tensors, if these are not the sequences' sizes

    @property
    def rows(self) -> list[Row]:
        """All rows, in order."""
        return [row for sequence in self.sequences for row in sequence]

    @property
    def lengths(self) -> list[int]:
        """The size of each of the B sequences, without padding."""
        return [sum(row.size for row in sequence) for sequence in self.sequences]

    @property
    def line_lengths(self) -> Sequence[int]:
        """The number of tokens in each line of the tensors, without padding."""
        return self.lengths if self.filled is None else self.filled

    @property
    def tokens(self) -> int:
        """Total size of all rows, without padding."""
        return sum(self.lengths)

    @property
    def supervised(self) -> int:
        """The number of units (tokens, labels) whose losses are added."""
        return sum(row.supervised for row in self.rows)

    @property
    def width(self) -> int:
        """The size of one sequence after padding: the sum of the sizes of its parts."""
        return self.padded // len(self.sequences)

    @property
    def padded(self) -> int:
        """The number of positions in all sequences, including padding."""
        if self.line_size is not None:
            return self.line_size * len(self.sequences)
        return sum(tensor.numel() for name, tensor in self.inputs.items() if name.endswith("input_ids"))


@dataclass(frozen=True)
class StepBatches:
    """This rank's micro-batches of one optimizer step. `indices`: the indices of these micro-batches among the
    micro-batches of all ranks. `again`: prepares the step again after a micro-batch was split, without values of other
    ranks; None if a split changes no prepared value."""

    step: int  # 0-based index of the optimizer step; negative for a dry-run step
    epoch: float  # epochs finished after this step
    indices: tuple[int, ...]
    batches: tuple[Batch, ...]
    seed: int = 0  # for all random draws of this step
    preparation: Preparation = field(default_factory=Preparation)
    again: Callable[[], StepBatches] | None = None

    @property
    def is_dry_run(self) -> bool:
        """Whether this is a dry-run step, which trains nothing."""
        return self.step < 0


class StepSource(Protocol):
    """Yields this rank's micro-batches of each step in training order, from a given step on. The result depends only on
    the rows, the settings and the seed."""

    count: int  # of steps

    def after(self, first_step: int) -> Iterator[StepBatches]: ...
