"""Objectives: a kind of rows and a loss, with companions. And the engine that runs their windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from tunekit.contracts.model import Answering, Head, Loss, Model, ModelOutput, Read, Sums
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
    Window,
)
from tunekit.errors import Problem
from tunekit.records import JsonObject


class RunView(Protocol):
    """What an objective and its companions see of a run: its model, its rows, its ranks."""

    model: Model
    rows: RowKind

    @property
    def gather(self) -> Gather: ...

    @property
    def progress(self) -> Progress: ...

    @property
    def is_simulated(self) -> bool:
        """Whether the model is on the meta device, without values."""

    def score(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """What `read` takes from the model's forward of each batch, on the host, without gradient or dropout."""

    def reference(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """The same of the policy at step 0."""

    def companion(self, key: str) -> Any:
        """The loaded companion with this key."""


class RowKind:
    """How examples become rows and batches. Subclasses are frozen dataclasses in objectives/rows.

    `draws`: whether `draw` changes rows; `notices`: what the user should know, with counts; `allowed_options`: names of
    options, the values that mean something for these rows, and why others mean nothing.
    """

    example: str  # the kind of example that formats give
    fingerprint: str  # sha256 of everything, besides `options`, that decides a row
    options: EncodeOptions
    notices: Counter[str]
    labels: Labels  # only of rows with labels
    packable: bool = False  # whether several rows may lie end to end in one sequence
    draws: bool = False
    reads_pairs: bool = False  # whether a question may be two texts
    has_choices: bool = False  # whether an answer can be chosen from a list (evaluation.choices)
    allowed_options: Sequence[tuple[str, str, str]] = ()
    room: str = ""  # " with room for KEY": what a row's length counts besides its own tokens

    @property
    def layout(self) -> RowLayout:
        """The parts and sizes of a row."""
        raise NotImplementedError

    def problems(self) -> list[Problem]:
        """Options that mean nothing for these rows."""
        return [
            Problem(why, f"write {allowed}", key=f"data.{name}")
            for name, allowed, why in self.allowed_options
            if getattr(self.options, name) not in allowed.replace(",", "").split()
        ]

    def examples(self, example: Any) -> Sequence[Any]:
        """The examples of the rows that one example takes; most take one."""
        return [example]

    def encode(self, example: Any, origin: str) -> Row:
        """The row. Raises: Dropped if nothing can be trained on; DataError if the row is wrong."""
        raise NotImplementedError

    def labels_of(self, row: Row) -> list[str]:
        """The labels of a row; only of rows with labels."""
        return self.labels.listed_in(row.parts["label"].tobytes().decode())

    def unlabelled(self, model: Model, prompts: Sequence[Any]) -> list[Row]:
        """Rows of prompts whose labels are not known: they have the first one. Only of rows with labels."""
        raise NotImplementedError

    def make_row(self, parts: RowParts, origin: str, number: int = 0, sizes: tuple[int, ...] | None = None) -> Row:
        """A row of these parts."""
        return Row(parts, self.sizes_of(parts) if sizes is None else sizes, self.units_in(parts), origin, number)

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        """The sizes of a row with these parts."""
        raise NotImplementedError

    def units_in(self, parts: RowParts) -> int:
        """The number of units that the loss sums in a row with these parts."""
        return 1

    def prompt(self, example: Any) -> tuple[Any, str] | None:
        """The prompt of an example (of text: ids up to where the answer begins), and its answer; None without one."""
        return None

    def question(self, text: str) -> Any:
        """The prompt made from a user's text, which names a file if rows are recordings or images."""
        raise NotImplementedError

    def question_of_pair(self, first: str, second: str) -> list[int]:
        """Ids of two texts of a user; only if `reads_pairs`."""
        raise NotImplementedError

    def shown(self, prompt: Any) -> str:
        """A prompt as a person reads it."""
        return str(prompt)

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> Self:
        """The rows for a model that keeps the documents of one sequence apart, or for one that does not.
        `shares_prefixes`: a document may begin with tokens of a different document, which are computed there."""
        return self

    def shared(self, row: Row) -> int:
        """Tokens of the shared prompt, which the sizes count once per answer but the model computes once."""
        return 0

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The part of a row at sizes start .. stop-1; the whole row if it has no sizes that can be cut."""
        return row

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """Rows that fill one sequence of this size; `part` of them is as large as it can be. One row if all have the
        same size."""
        return [next(rows)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """The batch whose sequence b holds the rows sequences[b]; parts that `prepare` added go into the targets."""
        raise NotImplementedError

    def draw(self, row: Row, key: tuple[int, ...]) -> Row:
        """The row with what is drawn at random for it in a step (crops, masks). `key`: seed, step, row, and the how
        many-th time the row is in the step."""
        return row

    def spans(self, row: Row) -> list[Span]:
        """The row as preview shows it."""
        raise NotImplementedError

    def evaluation_copy(self) -> Self:
        """The rows as they are measured: no augmentation, no dropout of prompts."""
        return self

    def choosing(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[RowKind, LossKind]:
        """Rows and loss that score the answers of (questions, answers); only if `has_choices`. `dtype`: of the mask."""
        raise NotImplementedError

    def counting(self) -> Self:
        """A copy with notices of its own."""
        return self.with_options(self.options)

    def with_options(self, options: EncodeOptions) -> Self:
        """The same rows, encoded with different options."""
        return replace(self, options=options, notices=Counter())  # type: ignore[type-var]

    def remade(self, batch: Batch, rows: Iterable[Row]) -> Batch:
        """The batch with these rows in the places of its own."""
        some = iter(rows)
        return self.collate([[next(some) for _ in sequence] for sequence in batch.sequences])

    def with_parts(self, window: Window, parts: Sequence[Mapping[str, Sequence[Array] | Array]]) -> Window:
        """The window whose rows have further parts, given for each batch: one value for each row."""
        batches = []
        for batch, named in zip(window.batches, parts, strict=True):
            rows = (
                row.with_parts({name: values[number] for name, values in named.items()})
                for number, row in enumerate(batch.rows)
            )
            batches.append(self.remade(batch, rows) if named else batch)
        return replace(window, batches=tuple(batches))


class LossKind:
    """What is minimised and measured over batches of one row kind. Subclasses are in objectives/losses.

    `metrics`: measured in every evaluation; `logged`: of each step, as its Loss sums them up;
    `reference`: whether the loss compares with the policy at step 0;
    `updates_per_sampling`: consecutive steps that reuse the same samples; a run resumes only where new ones are drawn.
    """

    metrics: Sequence[str] = ("loss",)
    logged: Sequence[str] = ()
    reference: bool = False
    updates_per_sampling: int = 1

    @property
    def measured_facts(self) -> Mapping[str, Any]:
        """What an evaluation decided, or a trained adapter states: plain values that the adapter's folder keeps."""
        return {}

    def prepare(self, run: RunView, window: Window) -> Window:
        """The window with everything that depends on the step; without gradient. It has this rank's whole share."""
        return window

    def measuring(self, run: RunView, rows: Rows, batches: Iterable[Batch]) -> LossKind:
        """The loss with the values that all evaluation rows decide together; `batches`: this rank's share."""
        return self

    def evaluation_copy(self) -> LossKind:
        """The loss of rows that are only measured."""
        return self

    def units(self, batch: Batch) -> Tensor:
        """(K,) float64: the divisor of the step's loss, known before the forward."""
        return torch.tensor([float(batch.supervised)], dtype=torch.float64)

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Sum over the batch's units."""
        raise NotImplementedError

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums that metrics are computed from, and ROW_LOSSES, which add up to its `loss`; no gradient."""
        raise NotImplementedError

    def class_counts(self, sums: Mapping[str, Any]) -> JsonObject | None:
        """Labels with their counts (correct, predicted, true), and their confusion matrix; None without labels."""
        return None


Facts = Mapping[str, Any]  # plain values of an objective that its adapter's folder keeps


@dataclass(frozen=True)
class CompanionSpec:
    """A companion that an objective needs: companions/KIND.py makes it. `key`: the recipe's key of its settings."""

    kind: str
    key: str
    settings: Any


@dataclass(frozen=True)
class CompanionFacts:
    """What plan knows of a companion before anything is loaded.

    `weight_bytes`: weights that are in memory during the whole run, if no simulation counts them.
    `any_token`: whether the model may read any token of its vocabulary, not only those of the rows.
    `streaming_obstacle`: why the base cannot be streamed beside it.
    `usable`: False if no run can be simulated with it.
    """

    weight_bytes: int = 0
    problems: Sequence[Problem] = ()
    any_token: bool = False
    streaming_obstacle: str | None = None
    usable: bool = True


CountingAs = Callable[[str], AbstractContextManager[None]]  # part of the memory ("logits") -> a block counted as it


class Companion:
    """Something that is used next to the trained model: teacher, reward models, pipeline parts, sampling.

    companions/KIND.py makes it from a CompanionSpec. `rehearses`: whether `rehearse` simulates anything.
    """

    head: Head | None = None  # of a companion whose output projection a loss reads
    rehearses: bool = False

    def __init__(self, spec: CompanionSpec) -> None:
        self.spec, self.key = spec, spec.key

    def facts(self, planned: Any) -> CompanionFacts:
        """What plan states; `planned`: companions.base.Planned, everything that is known without a weight."""
        return CompanionFacts()

    def notes(self, planned: Any, step_tokens: int) -> Sequence[str]:
        """Notes of the plan. `step_tokens`: of the largest step, padding included."""
        return ()

    def fingerprint(self) -> Mapping[str, str]:
        """sha256 of the files that decide its results, by key of the recipe: a resume compares them before it loads."""
        return {}

    def load(self, device: torch.device) -> None:
        """Bring it into memory."""

    def begin(self, run: RunView, rows: Sequence[Rows]) -> Mapping[str, str]:
        """Make what all steps need (class images, latents): before the first step, and again after a resume, which is
        refused if the sha256 of the files it reads changed."""
        return {}

    def simulated(self) -> Companion:
        """A copy on the meta device, for one simulated step."""
        return self

    def resident(self, device: torch.device) -> Sequence[Tensor]:
        """Tensors of a simulated companion that are on the device in every step."""
        return ()

    def present(self, model: Model) -> Sequence[Tensor]:
        """Further tensors that are on the device while `rehearse` runs."""
        return ()

    def rehearse(self, run: RunView, batch: Batch, counting_as: CountingAs) -> None:
        """In the simulated run: compute what needs most memory, for the largest batch."""


def _unchanged(section: object, seed: int) -> object:
    return section


@dataclass(frozen=True)
class Objective:
    """Rows and a loss, with companions: objectives/NAME.py composes one.

    `section(model, seed)`: the recipe's model section as the base must be loaded (heads, trained parts).
    `learn(rows)`: the objective with the labels and notes that only all rows together decide; None: it learns nothing.
    `complete`: whether it knows all labels.  `counts_rows`: key of a setting for which it counts all training rows.
    `facts`: plain values that its adapter's folder keeps.
    """

    name: str
    family: str
    rows: RowKind
    loss: LossKind
    answering: Answering | None = None
    companions: tuple[CompanionSpec, ...] = ()
    section: Callable[[Any, int], Any] = _unchanged
    learning: Callable[[Sequence[Rows]], Objective] | None = None
    complete: bool = True
    counts_rows: str | None = None
    facts: Facts = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measures_training: bool = False  # whether evaluation rows are usually training rows

    def learn(self, rows: Sequence[Rows]) -> Objective:
        """The objective after it has seen all rows: training rows, then evaluation rows if there are any."""
        return self if self.learning is None else self.learning(rows).with_options(self.rows.options)

    def evaluation_copy(self) -> Objective:
        """A copy for evaluation: no augmentation. LossKind.measuring adds statistics of the whole evaluation set."""
        return replace(self, rows=self.rows.evaluation_copy(), loss=self.loss.evaluation_copy())

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> Objective:
        """The objective whose rows are laid out so."""
        return replace(self, rows=self.rows.laid_out(end_to_end, shares_prefixes))

    def with_options(self, options: EncodeOptions) -> Objective:
        """The objective whose rows are encoded with these options."""
        return replace(self, rows=self.rows.with_options(options))

    def prepare(self, run: RunView, window: Window) -> Window:
        """The window as the engine runs it: random draws of its rows, then what the loss adds."""
        return self.loss.prepare(run, drawn_rows(self.rows, window, self.rows.draw) if self.rows.draws else window)


def drawn_rows(rows: RowKind, window: Window, draw: Callable[[Row, tuple[int, ...]], Row]) -> Window:
    """The window with what `draw` draws at random for each of its rows in this step, as RowKind.draw."""
    seen, batches = Counter[int](), []  # a row may be in a step more than once
    for batch in window.batches:
        changed = []
        for row in batch.rows:
            changed.append(draw(row, (window.seed, window.step, row.number, seen[row.number])))
            seen[row.number] += 1
        batches.append(rows.remade(batch, changed))
    return replace(window, batches=tuple(batches))


class Engine(Protocol):
    """Runs forward and backward of one window and leaves the summed gradient, divided by `units`, in place."""

    loss_scale: float
    losses: list[Tensor]  # the sum of each micro-batch of the last window

    def run_window(
        self, model: Any, objective: Objective, window: Window, units: Tensor, micro_batches: int = 1
    ) -> tuple[Tensor, Sums]:
        """Returns (K,) float64 loss sum of this rank divided by `units`, and the sums of what is logged;
        `micro_batches`: how many the step has over all ranks; per-step terms are averaged over them."""

    def make_up(self, model: Any, objective: Objective, batch: Batch, forwards: int) -> None:
        """Forward and backward of a batch, so many times, with a weight of zero: no gradient changes."""
