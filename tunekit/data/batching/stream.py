"""Training on data larger than memory: rows are encoded as they are read, and shuffled by shard and by buffer.

Only one buffer per source is in memory. The order depends only on (sources, settings, seed). A resumed run
encodes all earlier rows again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np

from tunekit.contracts import Batch, Row, RowKind, StepBatches
from tunekit.data.batching.order import draw_raw, permutation
from tunekit.data.batching.pack import first_fit
from tunekit.data.batching.steps import BatchSettings, Sizes, cut_by_key, cut_micro_batches, dealt
from tunekit.data.encoding.encode import SourceCounts, encode_rows
from tunekit.data.encoding.outcomes import SourceEncoder
from tunekit.data.reading.first import format_maker, single_rows
from tunekit.data.reading.lines import RawRow
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.shards import Sharded
from tunekit.errors import DataError

BUFFER_ROWS = 10_000
BUFFER_TOKENS = 1_000_000  # a few shards; filling the buffer takes some seconds before the first step
BUFFER_BYTES = 256_000_000  # only images and sound reach this limit; rows of text are far smaller
PACKED_STEPS = 8  # the rows of this number of steps are packed together
DRAWS = 4096


class StreamedRow(NamedTuple):
    """A row with its epoch: how often its source was read before this row, such as 1.5."""

    row: Row
    epoch: float


StreamedSequence = tuple[StreamedRow, ...]  # one sequence of a batch: one row, or a pack of rows


@dataclass(frozen=True)
class StreamedSource:
    """A source that is read once per epoch, in a different order each time."""

    sharded: Sharded
    format_name: str
    number: int
    kind: RowKind

    def rows(self, seed: int, shuffle: bool) -> Iterator[tuple[Row, float]]:
        """Endless rows, each with its epoch, such as 1.5: one complete pass, and half of the shards in the second pass.

        Raises: DataError listing the wrong rows of a buffer, or if no row can be trained on.
        """
        for epoch in count():
            has_rows = False
            for number, (buffer, done) in enumerate(self._buffers(seed, epoch, shuffle)):
                order = range(len(buffer))
                if shuffle:
                    order = permutation(len(buffer), "buffer", seed, self.number, epoch, number).tolist()
                for index in order:
                    has_rows = True
                    yield buffer[index], epoch + done
            if not has_rows:
                raise DataError(
                    "no row of this source can be trained on",
                    "see why with: tunekit data check RECIPE",
                    file=self.sharded.source.path,
                )

    def _buffers(self, seed: int, epoch: int, shuffle: bool) -> Iterator[tuple[list[Row], float]]:
        """The encoded rows of one epoch, as (buffer of rows, share of the epoch's shards that were read before)."""
        problems, name = Problems(), self.sharded.source.path
        started = [0]
        make_example = format_maker(self.format_name, name)
        source = SourceEncoder(make_example, self.kind.counting(), name)
        outcomes = map(source.outcome, self._raw_rows(seed, epoch, shuffle, problems, started))
        encoded = encode_rows(outcomes, self.kind, name=name, problems=problems, counts=SourceCounts())
        buffer: list[Row] = []
        tokens = held = 0
        for row, line, _, _ in encoded:
            buffer.append(replace(row, origin=self.sharded.origin(line)))
            tokens += row.size
            held += sum(part.nbytes for part in row.parts.values())
            if len(buffer) >= BUFFER_ROWS or tokens >= BUFFER_TOKENS or held >= BUFFER_BYTES:
                problems.raise_if_any()
                yield buffer, (started[0] - 1) / len(self.sharded.shards)
                buffer, tokens, held = [], 0, 0
        problems.raise_if_any()
        if buffer:
            yield buffer, (started[0] - 1) / len(self.sharded.shards)

    def _raw_rows(
        self, seed: int, epoch: int, shuffle: bool, problems: Problems, started: list[int]
    ) -> Iterator[RawRow]:
        shards = self.sharded.shards
        order = range(len(shards))
        if shuffle:
            order = permutation(len(shards), "shards", seed, self.number, epoch).tolist()
        for index in order:
            started[0] += 1
            yield from single_rows(self.sharded.read(shards[index], problems), self.format_name)


class StreamedSteps:
    """A StepSource over streamed sources. Rows are drawn in proportion to the weights of the sources."""

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        kind: RowKind,
        settings: BatchSettings,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if settings.max_steps is None:
            raise DataError("a streamed source has no known length", "set training.max_steps", key="training.max_steps")
        self.count = settings.max_steps
        self.steps_per_epoch: int | None = None
        self.micro_batches_per_epoch: int | None = None
        self._sources, self._kind, self._settings = tuple(sources), kind, settings
        self._rank, self._world = rank, world

    def after(self, first_step: int) -> Iterator[StepBatches]:
        """Yields this rank's micro-batches of each step, from `first_step` on."""
        micro_batches: list[tuple[StreamedSequence, ...]] = []
        step = 0
        for micro_batch in cut_micro_batches(self._groups(), self._sizes_of, self._settings):
            micro_batches.append(micro_batch)
            if len(micro_batches) < self._settings.gradient_accumulation_steps:
                continue
            for _ in range(self._settings.updates_per_sampling):
                if step >= first_step:
                    yield self._make_step(step, micro_batches)
                step += 1
                if step == self.count:
                    return
            micro_batches = []

    def _sizes_of(self, sequence: StreamedSequence) -> Sizes:
        return self._kind.layout.padded([*map(sum, zip(*(part.row.sizes for part in sequence), strict=True))])

    def _key_of(self, sequence: StreamedSequence) -> bytes:
        return self._kind.layout.key_of(sequence[0].row)

    def _make_step(self, step: int, micro_batches: Sequence[tuple[StreamedSequence, ...]]) -> StepBatches:
        if self._kind.layout.batch_key is not None:
            micro_batches = cut_by_key(micro_batches, self._key_of, self._sizes_of, self._settings)
        indices = dealt(len(micro_batches), self._rank, self._world, self._settings.rank_speeds)
        epoch = max(part.epoch for batch in micro_batches for group in batch for part in group)
        batches = tuple(self._collate(micro_batches[index]) for index in indices)
        return StepBatches(step, epoch, indices, batches, self._settings.seed)

    def _collate(self, groups: Sequence[StreamedSequence]) -> Batch:
        sequences = [[part.row for part in group] for group in groups]
        if self._settings.end_to_end:
            sequences = [[row for sequence in sequences for row in sequence]]
        return self._kind.collate(sequences)

    def _rows(self) -> Iterator[StreamedRow]:
        """Rows of all sources, in training order. The source of each row is drawn at random by the sources' weights."""
        settings = self._settings
        streams = [source.rows(settings.seed, settings.shuffle) for source in self._sources]
        weights = np.cumsum([source.sharded.source.weight for source in self._sources])  # (sources,)
        for block in count():
            draws = draw_raw(DRAWS, "mix", settings.seed, block) / 2.0**64 * weights[-1]  # (DRAWS,)
            chosen = np.minimum(np.searchsorted(weights, draws, side="right"), len(streams) - 1)  # (DRAWS,)
            for offset, number in enumerate(chosen.tolist()):
                row, epoch = next(streams[number])
                yield StreamedRow(replace(row, number=block * DRAWS + offset), epoch)

    def _groups(self) -> Iterator[StreamedSequence]:
        """Sequences of one row; with packing, packs of rows. The rows of PACKED_STEPS steps are packed together."""
        settings = self._settings
        if not settings.packing:
            for row in self._rows():
                yield (row,)
        per_micro_batch = settings.micro_batch_tokens or (settings.micro_batch_size or 1) * settings.max_length
        wanted = PACKED_STEPS * settings.gradient_accumulation_steps * max(per_micro_batch, settings.max_length)
        block: list[StreamedRow] = []
        tokens = 0
        for row in self._rows():
            block.append(row)
            tokens += row.row.size
            if tokens >= wanted:
                for pack in first_fit([part.row.size for part in block], settings.max_length):
                    yield tuple(block[position] for position in pack)
                block, tokens = [], 0
