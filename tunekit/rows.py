"""The data section and a tokenizer to encoded rows: cached, split, counted.

Comes in: DataSection, Tokenizer, seed.  Goes out: RowSet.  Next: plan.py, train.py, preview.py, evaluate.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunekit.data.batches import BatchSettings, TrainingWindows
from tunekit.data.cache import default_cache_folder, hash_of
from tunekit.data.encode import EncodeOptions
from tunekit.data.load import EncodedSource, load_source, read_examples
from tunekit.data.order import Share, draw_raw, epoch_rows
from tunekit.data.render import Renderer
from tunekit.data.store import ChosenRows, Part
from tunekit.decisions import RowCounts
from tunekit.errors import DataError, Problem, RecipeError, TunekitError
from tunekit.protocols import EncodedRows, Tokenizer, WindowSource
from tunekit.recipe.data import DataSection, Source

LONGEST_TEMPLATE_BYTES = 2**20


class Prompt(NamedTuple):
    """A row for generation: ids up to its last answer, that answer, and where the row stands."""

    prompt_ids: list[int]
    reference: str
    origin: str


@dataclass
class RowSet:
    """Rows to train on and to evaluate on, with their counts and what to tell the user (`notes`)."""

    train: EncodedRows
    evaluation: EncodedRows | None
    counts: RowCounts
    eval_counts: RowCounts | None
    fingerprint: str
    draws: tuple[Share, ...]
    streamed: bool
    notes: tuple[str, ...]
    read_prompts: Callable[[], list[Prompt]]

    def windows(self, settings: BatchSettings, *, rank: int = 0, world: int = 1) -> WindowSource:
        """The windows to train on, with the sources' weights."""
        return TrainingWindows(self.train, settings, rank=rank, world=world, draws=self.draws)

    def evaluation_prompts(self) -> list[Prompt]:
        """Every evaluation row that has an answer, as a prompt with that answer."""
        return self.read_prompts()


def load_rows(data: DataSection, tokenizer: Tokenizer, *, seed: int, cache_dir: Path | None = None) -> RowSet:
    """Encoded training and evaluation rows. Raises: DataError naming every wrong row, or that none is left."""
    options = encode_options(data)
    sources = load_sources(data.train, tokenizer, options, cache_dir)
    train, held = _split(sources, data.eval if isinstance(data.eval, float) else None, seed)
    eval_sources, evaluation = sources, held
    if isinstance(data.eval, tuple):
        eval_sources = load_sources(data.eval, tokenizer, options, cache_dir)
        evaluation = [_whole(source) for source in eval_sources]
    train_rows = ChosenRows(train)
    _require_rows(train_rows, sources, "data.train")
    draws = _shares(train_rows, [source.source.weight for source in sources])
    own = isinstance(data.eval, tuple)
    eval_rows = ChosenRows(evaluation) if data.eval is not None else None
    if eval_rows is not None:
        _require_rows(eval_rows, eval_sources, "data.eval")
    notes = [note for source in sources for note in source.notices]
    notes += [note for source in eval_sources for note in source.notices] if own else []
    return RowSet(
        train=train_rows,
        evaluation=eval_rows,
        counts=_count(sources, train_rows, draws, seed, held=0 if own else len(ChosenRows(held))),
        eval_counts=_count_evaluation(eval_sources, eval_rows, own) if eval_rows is not None else None,
        fingerprint=_fingerprint(data, sources, eval_sources if own else (), seed),
        draws=draws,
        streamed=False,
        notes=(*dict.fromkeys(notes), *_leaks(data, train_rows, eval_rows)),
        read_prompts=lambda: _prompts(eval_sources, evaluation, tokenizer, options),
    )


def load_evaluation_rows(
    data: DataSection, tokenizer: Tokenizer, *, seed: int, cache_dir: Path | None = None
) -> RowSet:
    """Only the evaluation rows of a data section; `train` is empty unless they are a fraction of it."""
    if isinstance(data.eval, tuple):
        options = encode_options(data)
        sources = load_sources(data.eval, tokenizer, options, cache_dir)
        parts = [_whole(source) for source in sources]
        rows = ChosenRows(parts)
        _require_rows(rows, sources, "data.eval")
        counts = _count_evaluation(sources, rows, own=True)
        notes = tuple(dict.fromkeys(note for source in sources for note in source.notices))
        return RowSet(
            train=ChosenRows([]),
            evaluation=rows,
            counts=RowCounts(0, 0, 0, 0, 0, 0, 0),
            eval_counts=counts,
            fingerprint=_fingerprint(data, (), sources, seed),
            draws=(),
            streamed=False,
            notes=notes,
            read_prompts=lambda: _prompts(sources, parts, tokenizer, options),
        )
    return load_rows(data, tokenizer, seed=seed, cache_dir=cache_dir)


def encode_options(data: DataSection) -> EncodeOptions:
    """The data section's options that decide ids, with the template read from its file."""
    template = None if data.chat_template is None else _read_template(Path(data.chat_template))
    return EncodeOptions(data.train_on, template, data.max_length, data.excess_length)


def _read_template(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > LONGEST_TEMPLATE_BYTES:
            raise RecipeError("this is no template file", "name a Jinja file", file=str(path), key="data.chat_template")
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the template cannot be read: {error}", "name a Jinja file", file=str(path), key="data.chat_template"
        ) from None


def load_sources(
    sources: Sequence[Source], tokenizer: Tokenizer, options: EncodeOptions, cache_dir: Path | None
) -> list[EncodedSource]:
    """Every source, encoded; the problems of all are raised together."""
    folder = cache_dir or default_cache_folder()
    loaded: list[EncodedSource] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            loaded.append(load_source(source, tokenizer, options, cache_folder=folder))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError.of(list(dict.fromkeys(problems)))
    return loaded


def _whole(source: EncodedSource) -> Part:
    return Part(source.store, np.arange(len(source.store), dtype=np.int64), source.name)


def _split(sources: Sequence[EncodedSource], fraction: float | None, seed: int) -> tuple[list[Part], list[Part]]:
    """Training and held-out rows of each source, by the hash of each row: equal rows fall on the same side."""
    if fraction is None:
        return [_whole(source) for source in sources], []
    train, held = [], []
    for source in sources:
        chosen = held_out(source.store.records["digest"], fraction, seed)  # (rows,)
        train.append(Part(source.store, np.flatnonzero(~chosen).astype(np.int64), source.name))
        held.append(Part(source.store, np.flatnonzero(chosen).astype(np.int64), source.name))
    return train, held


def held_out(digests: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """(rows,) which rows are held out: the nearest whole number of rows to the fraction, one at least.

    Rows are ordered by a seeded hash of their content. A group of equal rows at the border goes to training.
    """
    if len(digests) == 0:
        return np.zeros(0, dtype=np.bool_)
    key = draw_raw(1, "eval", seed)[0]
    mixed = np.asarray(digests) ^ key  # (rows,)
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    wanted = max(1, int(len(digests) * fraction + 0.5))
    values = np.sort(mixed)  # (rows,)
    limit = values[min(wanted, len(values) - 1)]
    chosen: NDArray[np.bool_] = mixed < limit
    if not chosen.any():
        chosen = mixed == values[0]
    return chosen


def _require_rows(rows: ChosenRows, sources: Sequence[EncodedSource], key: str) -> None:
    """Refuse an empty set, saying what became of its rows."""
    if len(rows):
        return
    reasons = sum((source.counts.dropped for source in sources), Counter[str]())
    why = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    raise DataError(
        f"no row is left to {'train' if key == 'data.train' else 'evaluate'} on" + (f": {why}" if why else ""),
        "raise data.max_length, or look at the rows with `tunekit preview`",
        file=sources[0].source.path if sources else None,
        key=key,
    )


def _shares(rows: ChosenRows, weights: Sequence[float]) -> tuple[Share, ...]:
    bounds = rows.starts.tolist()
    return tuple(Share(bounds[index], bounds[index + 1], weight) for index, weight in enumerate(weights))


def _count(
    sources: Sequence[EncodedSource], rows: ChosenRows, draws: tuple[Share, ...], seed: int, *, held: int
) -> RowCounts:
    """Counts of training rows; tokens are those of the first epoch, weights applied."""
    order = epoch_rows(draws, seed=seed, epoch=0, shuffle=False)  # (rows of the epoch,)
    return _sum_counts(sources, rows, order, held)


def _count_evaluation(sources: Sequence[EncodedSource], rows: ChosenRows, own: bool) -> RowCounts:
    order = np.arange(len(rows), dtype=np.int64)  # (rows,)
    if own:
        return _sum_counts(sources, rows, order, 0)
    return _sum_counts((), rows, order, -len(rows))


def _sum_counts(sources: Sequence[EncodedSource], rows: ChosenRows, order: NDArray[np.int64], held: int) -> RowCounts:
    reasons = sum((source.counts.dropped for source in sources), Counter[str]())
    lengths = rows.lengths  # (rows,)
    return RowCounts(
        read=sum(source.counts.read for source in sources) - held,
        trained=sum(source.counts.kept for source in sources) - held,
        dropped=sum(reasons.values()),
        truncated=sum(source.counts.truncated for source in sources),
        tokens=int(lengths[order].sum()),
        supervised_tokens=int(rows.supervised[order].sum()),
        longest_tokens=int(lengths.max(initial=0)),
        dropped_reasons=dict(sorted(reasons.items())),
    )


def _leaks(data: DataSection, train: ChosenRows, evaluation: ChosenRows | None) -> list[str]:
    """Warnings where rows are both trained and evaluated on."""
    if evaluation is None:
        return []
    notes = []
    if isinstance(data.eval, tuple):
        same = {source.path for source in data.train} & {source.path for source in data.eval}
        notes += [f"warning: {path} is both in data.train and data.eval" for path in sorted(same)]
    shared = int(np.isin(evaluation.digests, train.digests).sum())
    if shared:
        notes.append(f"warning: {shared} of {len(evaluation)} evaluation rows stand in the training rows too")
    return notes


def _fingerprint(
    data: DataSection, train: Sequence[EncodedSource], evaluation: Sequence[EncodedSource], seed: int
) -> str:
    fraction = data.eval if isinstance(data.eval, float) else None
    parts = [[source.fingerprint, source.source.weight] for source in train]
    return hash_of([parts, [source.fingerprint for source in evaluation], fraction, seed if fraction else None])


def _prompts(
    sources: Sequence[EncodedSource], parts: Sequence[Part], tokenizer: Tokenizer, options: EncodeOptions
) -> list[Prompt]:
    """Prompts of the evaluation rows, read again from their files."""
    renderer = Renderer(tokenizer, options.train_on, options.template)
    prompts: list[Prompt] = []
    for source, part in zip(sources, parts, strict=True):
        lines = set(source.store.records["line"][part.chosen].tolist())
        for line, example in read_examples(source.source, lines):
            try:
                found = renderer.prompt(example)
            except TunekitError as error:
                raise DataError(error.problems[0].what, file=source.source.path, line=line) from None
            if found is not None:
                prompts.append(Prompt(found[0], found[1], f"{source.name}:{line}"))
    return prompts
