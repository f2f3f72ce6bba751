"""Loads the rows of an objective from the data section, with the token cache, the held-out split and the counts."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunekit.contracts import EncodeOptions, Objective, Rows
from tunekit.data.batching.order import Share, epoch_rows, held_out
from tunekit.data.batching.steps import BatchSettings, StoredSteps
from tunekit.data.batching.stream import StreamedSource, StreamedSteps
from tunekit.data.encoding.encode import NO_TARGET_LEFT, TOO_LONG
from tunekit.data.encoding.notes import MANY_DROPPED, WARNING, dropped_notes
from tunekit.data.encoding.sample import sample_source
from tunekit.data.encoding.sources import EncodedSource, encode_options, load_sources, read_examples
from tunekit.data.encoding.store import ChosenRows, Part
from tunekit.data.reading.folder import with_table
from tunekit.data.reading.source import place_of
from tunekit.errors import DataError, RecipeError, TunekitError, listed
from tunekit.files.cache_folder import hash_of
from tunekit.formats.example import Example
from tunekit.recipe.data import DataSection, Source
from tunekit.records import RowCounts

STREAMED = "a training source is streamed (because of its size or the recipe)"
OWN_EVALUATION = "name a separate source in data.eval"
LIKE_EVALUATION = "encoded like an evaluation row"
SHOWN_PLACES = 5
FIRST_ROWS, MOST_UNKNOWN = 200, 0.01  # rows whose tokens are counted; the largest usual share of unknown tokens
UNKNOWN = "use the tokenizer that belongs to the base, or a base that was trained on such texts"


class Written(NamedTuple):
    """An example with its file and line."""

    file: str
    line: int
    example: Example


class Prompt(NamedTuple):
    """A row for generation. `prompt`: the input (for text, the ids before the last answer). `reference`: the last
    answer. `text`: the prompt as readable text."""

    prompt: object
    reference: str
    text: str


@dataclass
class RowSet:
    """Training and evaluation rows, with their counts and the notes for the user."""

    objective: Objective
    train: Rows
    evaluation: Rows | None
    counts: RowCounts
    eval_counts: RowCounts | None
    fingerprint: str
    notes: tuple[str, ...]
    evaluation_examples: Callable[[], Iterator[Written]]  # reads all evaluation rows from their files again
    draws: tuple[Share, ...] = ()
    streams: tuple[StreamedSource, ...] = ()

    @property
    def template(self) -> str | None:
        """The text of the data.chat_template file; None: the tokenizer's own template is used."""
        return self.objective.rows.options.template

    @property
    def all(self) -> list[Rows]:
        """The training rows, and the evaluation rows if there are any."""
        return [self.train] if self.evaluation is None else [self.train, self.evaluation]

    def evaluation_prompts(self) -> Iterator[Prompt]:
        """The evaluation rows that have an answer, as prompts for generation."""
        kind = self.objective.rows.counting()
        for file, line, example in self.evaluation_examples():
            try:
                prompt = kind.prompt(example)
            except TunekitError as error:
                first = error.problems[0]
                raise DataError(first.what, first.how, file=file, line=line) from None
            if prompt is not None:
                yield Prompt(*prompt, kind.readable(prompt[0]))

    def steps(self, settings: BatchSettings, *, rank: int = 0, world: int = 1) -> StoredSteps | StreamedSteps:
        """One rank's micro-batches of every optimizer step. Rows are drawn from each source by the source's weight."""
        if self.streams:
            return StreamedSteps(self.streams, self.objective.rows, settings, rank=rank, world=world)
        return StoredSteps(self.train, self.objective.rows, settings, rank=rank, world=world, draws=self.draws)


def load_rows(data: DataSection, objective: Objective, *, seed: int, cache_dir: Path | None = None) -> RowSet:
    """Encoded training and evaluation rows. Raises: DataError listing every wrong row, or if no row is left."""
    data = _with_tables(data)
    objective = _with_options(objective, encode_options(data))
    if any(source.streaming for source in data.train):
        return _load_streamed(data, objective, seed, cache_dir)
    sources = load_sources(data.train, objective.rows, cache_dir)
    split = _split(sources, data.eval if isinstance(data.eval, float) else None, seed)
    listed = load_sources(data.eval, objective.rows, cache_dir) if isinstance(data.eval, tuple) else []
    eval_sources, evaluation = (listed, [source.all_rows for source in listed]) if listed else (sources, split.held)
    train_rows = ChosenRows(split.train)
    if split.held and not len(train_rows) and len(ChosenRows(split.held)):
        raise _nothing_left(split, objective)
    _require_rows(train_rows, sources, "data.train")
    draws = _shares(train_rows, [source.source.weight for source in sources])
    eval_rows = ChosenRows(evaluation) if data.eval is not None else None
    if eval_rows is not None:
        _require_rows(eval_rows, eval_sources, "data.eval")
    leaks, more = _leaks(data, objective, train_rows, eval_rows), [*_share_notes(split)]
    more += _unknown_notes(objective, train_rows)
    return RowSet(
        objective=objective.learn([train_rows] if eval_rows is None else [train_rows, eval_rows]),
        train=train_rows,
        evaluation=eval_rows,
        counts=_count(sources, train_rows, epoch_rows(draws, seed=seed, epoch=0, shuffle=False), split.left_out),
        eval_counts=None if eval_rows is None else _count(listed, eval_rows),
        fingerprint=_fingerprint(data, sources, listed, seed),
        draws=draws,
        notes=tuple(dict.fromkeys([*_notes(sources), *_notes(listed, evaluation=True), *leaks, *more])),
        evaluation_examples=lambda: written_rows([each.source for each in eval_sources], evaluation, objective),
    )


def load_evaluation_rows(
    data: DataSection,
    objective: Objective,
    *,
    seed: int,
    cache_dir: Path | None = None,
    caller_columns: Container[str] = (),
) -> RowSet:
    """Only the evaluation rows of a data section. `train` is empty, unless data.eval is a fraction of data.train.

    `caller_columns`: columns that the caller reads; the notes do not call them unread.
    """
    data = _with_tables(data)
    if isinstance(data.eval, tuple):
        objective = _with_options(objective, encode_options(data))
        sources = load_sources(data.eval, objective.rows, cache_dir, caller_columns)
        parts = [source.all_rows for source in sources]
        rows = ChosenRows(parts)
        _require_rows(rows, sources, "data.eval")
        return RowSet(
            objective=objective.learn([rows]),
            train=ChosenRows([]),
            evaluation=rows,
            counts=RowCounts(0, 0, 0, 0, 0, 0, 0),
            eval_counts=_count(sources, rows),
            fingerprint=_fingerprint(data, (), sources, seed),
            notes=_notes(sources, evaluation=True),
            evaluation_examples=lambda: written_rows([each.source for each in sources], parts, objective),
        )
    return load_rows(data, objective, seed=seed, cache_dir=cache_dir)


def _load_streamed(data: DataSection, objective: Objective, seed: int, cache_dir: Path | None) -> RowSet:
    """Rows of streamed sources. `train` has only the first rows of each source; counts are estimated from them."""
    if isinstance(data.eval, float):
        raise RecipeError(f"{STREAMED}, so no fraction can be held out", OWN_EVALUATION, key="data.eval")
    if objective.rows.layout.distinct is not None:
        what = f"{STREAMED}, so equal texts in one step cannot be avoided, as this loss needs"
        raise RecipeError(what, "use files that fit into memory, or another objective.loss", key="data.train")
    if not objective.complete:
        what = f"{STREAMED}, and its first rows can lack some of the labels"
        raise RecipeError(what, "list all labels", key="objective.labels")
    if objective.counts_rows is not None:
        what = f"{STREAMED}, so its rows cannot be counted before training"
        raise RecipeError(what, "write the weights as numbers", key=objective.counts_rows)
    sampled = [sample_source(source, number, objective.rows) for number, source in enumerate(data.train)]
    streams, samples = zip(*sampled, strict=True)
    rows = ChosenRows([sample.all_rows for sample in samples])
    _require_rows(rows, samples, "data.train")
    draws = _shares(rows, [source.weight for source in data.train])
    counts = _count(samples, rows)
    trained = sum(sample.counts.kept for sample in samples)
    scale = trained / counts.trained
    objective = objective.learn([rows])
    evaluation = None if data.eval is None else load_evaluation_rows(data, objective, seed=seed, cache_dir=cache_dir)
    fingerprint = [_fingerprint(data, samples, (), seed), evaluation.fingerprint if evaluation else None, "streamed"]
    return RowSet(
        objective=objective,
        train=rows,
        evaluation=evaluation.evaluation if evaluation else None,
        counts=replace(
            counts,
            read=trained + counts.dropped,
            trained=trained,
            tokens=round(counts.tokens * scale),
            supervised_tokens=round(counts.supervised_tokens * scale),
            estimated=True,
        ),
        eval_counts=evaluation.eval_counts if evaluation else None,
        fingerprint=hash_of(fingerprint),
        draws=draws,
        streams=streams,
        notes=tuple(
            dict.fromkeys(
                [*_notes(samples), *(evaluation.notes if evaluation else ()), *_unknown_notes(objective, rows)]
            )
        ),
        evaluation_examples=evaluation.evaluation_examples if evaluation else lambda: iter(()),
    )


def _with_options(objective: Objective, options: EncodeOptions) -> Objective:
    """The objective, with the data section's options. Raises: RecipeError for options that its rows do not support."""
    objective = objective.with_options(options)
    problems = objective.rows.problems()
    if problems:
        raise RecipeError.of(problems)
    return objective


def _with_tables(data: DataSection) -> DataSection:
    """The data section, with the path of the table in place of each folder that has a table."""
    train, evaluation = tuple(map(with_table, data.train)), data.eval
    evaluation = tuple(map(with_table, evaluation)) if isinstance(evaluation, tuple) else evaluation
    return data.model_copy(update={"train": train, "eval": evaluation})


def _selected(source: EncodedSource, selected: NDArray[np.bool_]) -> Part:
    """The rows of a source for which `selected` (rows,) is true."""
    return Part(source.store, np.flatnonzero(selected).astype(np.int64), source.name, source.files)


class Split(NamedTuple):
    """The rows of each source, divided by a fraction. `held`: the evaluation rows. `left_out`: rows that are not
    trained on because they are encoded like an evaluation row. `dropped`: the number of evaluation rows that cannot be
    encoded."""

    train: list[Part]
    held: list[Part]
    left_out: list[Part]
    dropped: int


def _split(sources: Sequence[EncodedSource], fraction: float | None, seed: int) -> Split:
    """The divided rows. The hash of a raw row decides whether it is held out, before any row is dropped. So the
    tokenizer changes nothing, equal rows of all sources stay together, and so do all rows that are made from one raw
    row.
    """
    if fraction is None:
        return Split([source.all_rows for source in sources], [], [], 0)
    stores = [source.store for source in sources]
    out = np.concatenate([store.raw[held_out(store.raw, fraction, seed)] for store in stores])  # (held-out raw rows,)
    raw = [np.isin(store.raw, out) for store in stores]  # (raw rows,) of each source
    chosen = [is_held[store.records["number"]] for store, is_held in zip(stores, raw, strict=True)]  # (rows,) of each
    digests = [store.records["digest"] for store in stores]  # (rows,) of each source
    known = np.concatenate([values[is_held] for values, is_held in zip(digests, chosen, strict=True)])
    same = [~is_held & np.isin(values, known) for values, is_held in zip(digests, chosen, strict=True)]
    train = [~(is_held | alike) for is_held, alike in zip(chosen, same, strict=True)]
    train_parts, held, left_out = (
        [_selected(*pair) for pair in zip(sources, rows, strict=True)] for rows in (train, chosen, same)
    )
    kept = sum(part.written_rows for part in held)
    return Split(train_parts, held, left_out, sum(int(is_held.sum()) for is_held in raw) - kept)


def _nothing_left(split: Split, objective: Objective) -> DataError:
    """The error if the held-out rows leave no training row."""
    places, unknown = _places(split.left_out), _unknown_share(objective, ChosenRows(split.left_out))
    if not places:
        what = "all rows are equal, or there is only one row, so no fraction can be held out"
        return DataError(what, OWN_EVALUATION, key="data.eval")
    what = f"all training rows are encoded like evaluation rows ({listed(places, SHOWN_PLACES)})"
    if unknown > MOST_UNKNOWN:
        return DataError(f"{what}, because {unknown:.0%} of their tokens are unknown", UNKNOWN, key="model")
    return DataError(what, OWN_EVALUATION, key="data.eval")


def _unknown_share(objective: Objective, rows: ChosenRows) -> float:
    """The share of the first rows' tokens that is the tokenizer's unknown token."""
    parts = objective.rows.layout.token_parts
    ids = [row.parts[part] for row in map(rows.__getitem__, range(min(len(rows), FIRST_ROWS))) for part in parts]
    return float(np.mean(np.concatenate(ids) == objective.rows.unknown_id)) if ids else 0.0


def _unknown_notes(objective: Objective, rows: ChosenRows) -> Iterator[str]:
    """A warning if many tokens of the first rows are unknown."""
    if objective.rows.unknown_id is not None and (share := _unknown_share(objective, rows)) > MOST_UNKNOWN:
        first = f"the first {min(len(rows), FIRST_ROWS):,} training rows"
        yield f"warning: {share:.1%} of the tokens of {first} are unknown to the tokenizer; {UNKNOWN}"


def _places(parts: Sequence[Part]) -> list[str]:
    """The file and line of each row."""
    return list(dict.fromkeys(part.origin(index) for part in parts for index in range(len(part.chosen))))


def _share_notes(split: Split) -> Iterator[str]:
    """Notes about training rows that are left out, and about evaluation rows that are dropped."""
    if places := _places(split.left_out):
        many = WARNING if len(places) > MANY_DROPPED * sum(part.written_rows for part in split.train) else ""
        which = f"{len(places):,} training rows are left out, because they are"
        which = "1 training row is left out, because it is" if len(places) == 1 else which
        yield f"{many}{which} encoded like an evaluation row: {listed(places, SHOWN_PLACES)}"
    if split.dropped:
        rows = split.dropped + sum(part.written_rows for part in split.held)
        which = f"{split.dropped:,} of the {rows:,} evaluation rows are"
        which = f"1 of the {rows:,} evaluation rows is" if split.dropped == 1 else which
        yield f"warning: {which} dropped, so a different base may be evaluated on different rows"


def _require_rows(rows: ChosenRows, sources: Sequence[EncodedSource], key: str) -> None:
    """Raises: DataError if there are no rows, with the reasons why rows were dropped."""
    if len(rows):
        return
    reasons = sum((source.counts.dropped for source in sources), Counter[str]())
    why = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    too_long = not reasons or any(reason.startswith((TOO_LONG, NO_TARGET_LEFT)) for reason in reasons)
    what = f"no row is left to {'train' if key == 'data.train' else 'evaluate'} on" + (f": {why}" if why else "")
    cut = "raise data.max_length, or inspect the rows with `tunekit preview`"
    file = sources[0].source.path if sources else None
    raise DataError(what, cut if too_long else "correct or replace these rows", file=file, key=key)


def _shares(rows: ChosenRows, weights: Sequence[float]) -> tuple[Share, ...]:
    bounds = rows.starts.tolist()
    return tuple(Share(bounds[index], bounds[index + 1], weight) for index, weight in enumerate(weights))


def _count(
    sources: Sequence[EncodedSource],
    rows: ChosenRows,
    order: NDArray[np.int64] | None = None,
    left_out: Sequence[Part] = (),
) -> RowCounts:
    """Counts of the read, trained, dropped and truncated rows of the sources, and of their tokens.

    `order`: the rows whose tokens are counted; by default all rows, once. A row that was split counts once.
    `left_out`: rows that are encoded like an evaluation row. Held-out evaluation rows do not count as read for
    training.
    """
    reasons = sum((source.counts.dropped for source in sources), Counter[str]())
    missing = sum(
        len(np.setdiff1d(part.numbers, kept.numbers)) for part, kept in zip(left_out, rows.parts, strict=False)
    )
    reasons += Counter({LIKE_EVALUATION: missing})
    lengths, supervised = rows.lengths, rows.supervised  # (rows,)
    order = np.arange(len(rows), dtype=np.int64) if order is None else order
    trained = sum(part.written_rows for part in rows.parts)
    return RowCounts(
        read=trained + sum(reasons.values()),
        trained=trained,
        dropped=sum(reasons.values()),
        truncated=sum(source.counts.truncated for source in sources),
        tokens=int(lengths[order].sum()),
        supervised_tokens=int(supervised[order].sum()),
        longest_tokens=int(lengths.max(initial=0)),
        dropped_reasons=dict(sorted(reasons.items())),
    )


def _notes(sources: Sequence[EncodedSource], *, evaluation: bool = False) -> tuple[str, ...]:
    """The notes of all sources, with warnings of dropped rows; equal notes appear once."""
    notes = ((*source.notices, *dropped_notes(source.name, source.counts, evaluation=evaluation)) for source in sources)
    return tuple(dict.fromkeys(chain.from_iterable(notes)))


def _leaks(data: DataSection, objective: Objective, train: ChosenRows, evaluation: ChosenRows | None) -> list[str]:
    """Warnings about rows that are both in the training rows and in the evaluation rows."""
    if evaluation is None or objective.measures_training:
        return []
    notes = []
    if isinstance(data.eval, tuple):
        same = {source.path for source in data.train} & {source.path for source in data.eval}
        notes += [f"warning: {path} is both in data.train and data.eval" for path in sorted(same)]
    shared = int(np.isin(evaluation.digests, train.digests).sum())
    if shared:
        notes.append(f"warning: {shared} of {len(evaluation)} evaluation rows are also training rows")
    return notes


def _fingerprint(
    data: DataSection, train: Sequence[EncodedSource], evaluation: Sequence[EncodedSource], seed: int
) -> str:
    fraction = data.eval if isinstance(data.eval, float) else None
    parts = [[source.fingerprint, source.source.weight] for source in train]
    share = None if fraction is None else [seed, "raw rows"]  # older versions divided encoded rows
    return hash_of([parts, [source.fingerprint for source in evaluation], fraction, share])


def written_rows(sources: Sequence[Source], parts: Sequence[Part], objective: Objective) -> Iterator[Written]:
    """The examples of the rows that `parts` select, read from their files. `parts`: one part per source."""
    for source, part in zip(sources, parts, strict=True):
        numbers = set(part.numbers.tolist())
        for line, example in read_examples(source, objective.rows.example, numbers):
            yield Written(*place_of(source.path, line), example)
