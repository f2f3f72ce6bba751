"""Interfaces of objectives (a kind of rows, a loss), and of the engine that trains on a step's batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts.model import GREEDY, Answering, Counts, Loss, Model, ModelOutput, Read, Sampling, Sums
from tunekit.contracts.rows import (
    Array,
    Batch,
    EncodeOptions,
    Gather,
    Labels,
    Progress,
    Row,
    RowLayout,
    RowParts,
    Rows,
    Span,
    StepBatches,
    Tokenizer,
)
from tunekit.errors import Problem
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

CompanionType = TypeVar("CompanionType")


class RunView(Protocol):
    """The part of a run that an objective and its companions can use: the model, the rows and the ranks."""

    rows: RowKind

    @property
    def model(self) -> Model: ...

    @property
    def gather(self) -> Gather: ...

    @property
    def progress(self) -> Progress: ...

    @property
    def is_simulated(self) -> bool:
        """Whether the model is on the meta device."""

    @property
    def on_split(self) -> Callable[[str], None]:
        """A callback: it gets the size of each batch that ran out of memory, and that is now computed in parts."""

    def score(self, batches: Sequence[Batch], read: Read, counts: Counts | None = None) -> list[Tensor]:
        """The values that `read` computes from each batch's forward, on the host, without gradient or dropout.
        `counts`: how many values each sequence has; None: 1 each, so S values for each of P rows are (S P, ...)."""

    def reference(self, batches: Sequence[Batch], read: Read, counts: Counts | None = None) -> list[Tensor]:
        """Like `score`, but with the policy at step 0."""

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
        """The generated ids for each prompt, up to and including a stop id. `seeds`: one seed for each prompt.
        `batch_size`: how many prompts are continued at once."""

    def gather_rows(self, step: StepBatches, values: Sequence[Tensor]) -> Tensor:
        """The rows of all ranks, on the host of every rank, in the order of the step's micro-batches.
        `values`: one tensor (rows, ...) for each micro-batch of this rank, which may have none."""

    def score_step(self, step: StepBatches, read: Read) -> list[Tensor]:
        """The values that `read` computes from each micro-batch in the later forward of a training step, on the device.
        Parts, modes and seeds are the same, so they are equal bit for bit on a CPU."""

    def is_one_part(self, step: StepBatches) -> bool:
        """Whether the step is a single micro-batch on all ranks together, which is not split. All ranks call this."""

    def companion(self, protocol: type[CompanionType]) -> CompanionType:
        """The companion that has this protocol. The loss that uses a companion declares its protocol."""


class RowKind:
    """Encodes examples as rows, and collates rows into batches. Subclasses are frozen dataclasses in objectives/rows.

    `draws`: whether `draw` changes rows. `notices`: messages for the user, with counts. `allowed_options`: for each
    restricted option: its name, its valid values, and the reason for the restriction.
    """

    example: str  # the kind of example that formats give
    fingerprint: str  # sha256 of everything besides `options` that affects a row
    options: EncodeOptions
    notices: Counter[str]
    labels: Labels  # only of rows with labels
    packable: bool = False  # whether one sequence may contain several rows
    unpackable = "rows of this objective cannot be packed"  # a message
    draws: bool = False
    reads_pairs: bool = False  # whether a question may be two texts
    has_choices: bool = False  # whether an answer can be chosen from a list (evaluation.choices)
    allowed_options: Sequence[tuple[str, str, str]] = ()
    has_reasoning: bool = False  # whether data.reasoning applies to the rows' answers
    has_images: bool = False  # whether images of rows can be made smaller (data.excess_length: shrink)
    media_fingerprint: str = ""  # sha256 of what makes values from the files that rows name
    room: str = ""  # " with room for KEY" in messages: a part of a row's length besides its own tokens

    @property
    def documents(self) -> RowKind | None:
        """The kind of the documents in evaluation.corpus; None if evaluations search no documents."""
        return None

    @property
    def unknown_id(self) -> int | None:
        """The id of the tokenizer's unknown token; None for rows that are not text."""
        return None

    @property
    def layout(self) -> RowLayout:
        """The names, dtypes and sizes of a row's arrays."""
        raise NotImplementedError

    def problems(self) -> list[Problem]:
        """Problems for options of the data section whose values are invalid for these rows."""
        no_reasoning = (
            "reasoning",
            "template",
            "the rows of this objective have no answers with reasoning to train on",
        )
        no_images = "excess_length", "drop, truncate, split or error", "these rows have no images to make smaller"
        restricted = [*self.allowed_options, *([] if self.has_reasoning else [no_reasoning])]
        if self.options.excess_length == "shrink" and not any(name == "excess_length" for name, _, _ in restricted):
            restricted += [] if self.has_images else [no_images]
        return [
            Problem(why, f"write {allowed}", key=f"data.{name}")
            for name, allowed, why in restricted
            if getattr(self.options, name) not in allowed.replace(",", "").split()
        ]

    def examples(self, example: Any) -> Sequence[Any]:
        """The examples to encode, one row for each. Most kinds return only the given example."""
        return [example]

    def reasoning_left_out(self, example: Any) -> list[int]:
        """The messages of a conversation whose reasoning the chat template leaves out, as indices."""
        return []

    def cut_texts(self, example: Any) -> list[str]:
        """The names of an example's texts that are cut to a maximum length of their own."""
        return []

    def encode(self, example: Any, origin: str) -> Row:
        """Encode an example as a row. Raises: Dropped if it has nothing to train on; DataError if it is wrong."""
        raise NotImplementedError

    def labels_of(self, row: Row) -> list[str]:
        """The labels of a row; only for kinds with labels."""
        return self.labels.listed_in(row.parts["label"].tobytes().decode())

    def unlabelled(self, model: Model, prompts: Sequence[Any]) -> list[Row]:
        """Rows for prompts without labels. The first label is a placeholder. Only for kinds with labels."""
        raise NotImplementedError

    def make_row(self, parts: RowParts, origin: str, number: int = 0, sizes: tuple[int, ...] | None = None) -> Row:
        """A row with these arrays."""
        return Row(parts, self.sizes_of(parts) if sizes is None else sizes, self.units_in(parts), origin, number)

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        """The sizes (numbers of tokens, frames or pixels) of a row with these arrays."""
        raise NotImplementedError

    def units_in(self, parts: RowParts) -> int:
        """The number of units (tokens, labels) of a row with these arrays; the loss adds the losses of all units."""
        return 1

    def prompt(self, example: Any) -> tuple[Any, str] | None:
        """The prompt of an example (for text: the ids before the answer) and its answer; None if there is no prompt."""
        return None

    def question(self, text: str) -> Any:
        """The prompt made from a user's text. If rows are recordings or images, the text is the path of a file."""
        raise NotImplementedError

    def question_of_pair(self, first: str, second: str) -> list[int]:
        """The prompt (ids) made from a user's pair of texts. Only for kinds with `reads_pairs`."""
        raise NotImplementedError

    def readable(self, prompt: Any) -> str:
        """A prompt as readable text."""
        return str(prompt)

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> Self:
        """A copy for a given model. `end_to_end`: whether the model separates documents packed into a sequence.
        `shares_prefixes`: whether a document may use a prefix that is computed in another document."""
        return self

    def shared(self, row: Row) -> int:
        """Tokens of a shared prompt, which the model computes once, although the sizes count them per answer."""
        return 0

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row's tokens from start to stop-1, counted as in its sizes. If the row cannot be cut: the whole row."""
        return row

    def pieces(self, row: Row, size: int) -> list[Row]:
        """The row, split into pieces of at most `size` tokens."""
        return [self.cut(row, start, start + size) for start in range(0, self.layout.length(row.sizes), size)]

    def text_ids(self, row: Row) -> Array:
        """(T,) the ids of the row's texts, on which two models are compared. Tokens of images are left out."""
        ids: Array = np.concatenate([row.parts[name] for name in self.layout.token_parts])
        return ids

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """Rows that fill one sequence of this size, for a simulation. `part`: the index of the size to make as large as
        possible. If all rows of this kind have the same size, the result is one row."""
        return [next(rows)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make a batch with one line per sequence of rows. Values that `prepare_step` added to rows become targets."""
        raise NotImplementedError

    def draw(self, row: Row, key: tuple[int, ...]) -> Row:
        """The row after its random changes (crops, masks) for a step. `key`: seed, step, row number, and how often the
        row already occurred in this step."""
        return row

    def prepare_rows(self, run: RunView, step: StepBatches) -> StepBatches:
        """Add values to the step's rows that frozen parts of the base compute. They have no gradient."""
        return step

    def spans(self, row: Row) -> list[Span]:
        """The row as preview shows it."""
        raise NotImplementedError

    def evaluation_copy(self) -> Self:
        """A copy for evaluation: without augmentation, and without dropout of prompts."""
        return self

    def choosing(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[RowKind, LossKind]:
        """Rows and loss for multiple choice. `shape`: (questions, answers); `dtype`: the attention mask's dtype."""
        raise NotImplementedError

    def counting(self) -> Self:
        """A copy with its own counts of notices."""
        return self.with_options(self.options)

    def with_options(self, options: EncodeOptions) -> Self:
        """A copy that encodes with these options."""
        return replace(self, options=options, notices=Counter())  # type: ignore[type-var]

    def with_rows(self, batch: Batch, rows: Iterable[Row]) -> Batch:
        """A copy of the batch with these rows instead of its own rows."""
        some = iter(rows)
        return self.collate([[next(some) for _ in sequence] for sequence in batch.sequences])

    def with_parts(self, step: StepBatches, parts: Sequence[Mapping[str, Sequence[Array] | Array]]) -> StepBatches:
        """Add values to the rows of the step. `parts`: for each batch, a mapping from a name to its rows' values."""
        batches = []
        for batch, named in zip(step.batches, parts, strict=True):
            rows = (
                row.with_parts({name: values[number] for name, values in named.items()})
                for number, row in enumerate(batch.rows)
            )
            batches.append(self.with_rows(batch, rows) if named else batch)
        return replace(step, batches=tuple(batches))


class LossKind:
    """The loss and the metrics for batches of one kind of rows. Subclasses are in objectives/losses.

    `metrics`: names of the metrics of each evaluation; `logged`: names of values that each step logs from Loss.metrics;
    `reference`: whether the loss compares with the policy at step 0; `without_reference`: what to use instead;
    `updates_per_sampling`: how many steps reuse the same samples. A run resumes only where new samples are drawn.
    `measured_ranks`: for each ranking of documents that `measuring` made, the ranks (from 0) of the documents that are
    relevant to each query.
    `reads_output`: whether `sums` reads the output; False if `measuring` has computed all values.
    """

    metrics: Sequence[str] = ("loss",)
    logged: Sequence[str] = ()
    reference: bool = False
    without_reference = "an objective without a reference model, such as orpo or simpo"
    updates_per_sampling: int = 1
    reads_output: bool = True
    measured_ranks: Mapping[str, Sequence[Sequence[int]]] = MappingProxyType({})

    @property
    def measured_facts(self) -> Mapping[str, Any]:
        """Values to save in the adapter's folder: chosen in an evaluation, or read from a trained adapter."""
        return {}

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        """Add values that depend on the whole step to this rank's micro-batches. They have no gradient. All ranks call
        this together. `earlier`: the prepared previous step, if this step may reuse its samples."""
        return step

    def measuring(self, run: RunView, rows: Rows, batches: Iterable[Batch]) -> LossKind:
        """A copy of the loss with statistics computed from all evaluation rows. `batches`: this rank's share of them,
        and of the documents to search."""
        return self

    def evaluation_copy(self) -> LossKind:
        """A copy of the loss for evaluation rows, which are not trained on."""
        return self

    def units(self, batch: Batch) -> Tensor:
        """The divisor of the step's loss, known before the forward; (K,) float64."""
        return torch.tensor([float(batch.supervised)], dtype=torch.float64)

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The loss, summed over the batch's units."""
        raise NotImplementedError

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """Sums from which metrics are computed, without gradient. Rows' losses in ROW_LOSSES add up to `loss`."""
        raise NotImplementedError

    def class_counts(self, sums: Mapping[str, Any]) -> JsonObject | None:
        """The labels, their counts (correct, predicted, true) and confusion matrix; None without labels."""
        return None


Facts = Mapping[str, Any]  # plain values of an objective that are saved in its adapter's folder


@dataclass(frozen=True)
class CompanionSpec:
    """The settings from which companions/KIND.py makes a companion. `key`: the recipe's key of the companion."""

    kind: str
    key: str
    settings: ObjectiveSettings


def _unchanged(section: ModelSection, seed: int) -> ModelSection:
    return section


@dataclass(frozen=True)
class Objective:
    """A kind of rows and a loss, with companions. A module objectives/NAME.py makes the objective NAME.

    `section(model, seed)`: returns the model section for loading the base, with heads and names of trained parts.
    `learning(objective, rows)`: returns this objective with labels and notes computed from all rows; None if it needs
    neither.
    `complete`: whether all labels are known. `counts_rows`: key of a setting that depends on the number of rows.
    `facts`: plain values that are saved in the adapter's folder.
    """

    name: str
    family: str
    rows: RowKind
    loss: LossKind
    answering: Answering | None = None
    companions: tuple[CompanionSpec, ...] = ()
    section: Callable[[ModelSection, int], ModelSection] = _unchanged
    learning: Callable[[Objective, Sequence[Rows]], Objective] | None = None
    complete: bool = True
    counts_rows: str | None = None
    facts: Facts = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measures_training: bool = False  # whether the evaluation rows are usually also training rows

    def learn(self, rows: Sequence[Rows]) -> Objective:
        """The objective after it has read all rows: the training rows first, then any evaluation rows."""
        return self if self.learning is None else self.learning(self, rows).with_options(self.rows.options)

    def evaluation_copy(self) -> Objective:
        """A copy for evaluation, without augmentation. LossKind.measuring then adds statistics of all rows."""
        return replace(self, rows=self.rows.evaluation_copy(), loss=self.loss.evaluation_copy())

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> Objective:
        """A copy whose rows have the layout that RowKind.laid_out describes."""
        return replace(self, rows=self.rows.laid_out(end_to_end, shares_prefixes))

    def with_options(self, options: EncodeOptions) -> Objective:
        """A copy whose rows are encoded with these options."""
        return replace(self, rows=self.rows.with_options(options))

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None = None) -> StepBatches:
        """Prepare the step's micro-batches: change their rows randomly, then add values that frozen parts and the loss
        compute.
        `earlier`: see LossKind.prepare_step."""
        step = draw_rows(self.rows, step, self.rows.draw) if self.rows.draws else step
        return self.loss.prepare_step(run, self.rows.prepare_rows(run, step), earlier)


def draw_rows(rows: RowKind, step: StepBatches, draw: Callable[[Row, tuple[int, ...]], Row]) -> StepBatches:
    """The step's micro-batches, after `draw` has changed each of their rows. `draw`: see RowKind.draw."""

    def changed(batch: Batch) -> Batch:
        keys = [(step.seed, step.step, row.number, row.occurrence) for row in batch.rows]
        return rows.with_rows(batch, list(map(draw, batch.rows, keys)))

    return replace(step, batches=tuple(map(changed, step.batches)))
