"""Which rows are trained together, and when: epochs to packs to micro-batches to windows of one optimizer step.

Comes in: encoded rows and BatchSettings.  Goes out: TrainingWindows, evaluation batches, the longest batch.  Next: the
loop.  The order is a pure function of (rows, settings, seed): a window never depends on the number of ranks, and
`windows(first_step)` gives exactly the windows that an uninterrupted run would have seen from there on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunekit.contracts import Batch, EncodedRow, EncodedRows, Window
from tunekit.data.batching.order import Share, epoch_rows
from tunekit.data.batching.pack import first_fit
from tunekit.data.batching.pad import collate, collate_rows
from tunekit.errors import DataError

Group = tuple[int, ...]  # the rows of one sequence: one row, or a pack
MicroBatch = tuple[Group, ...]
Widths = tuple[int, ...]  # tokens of a sequence, part by part
STEP_ROUNDING = 1e-9  # 0.1 * 30 is not quite 3


@dataclass(frozen=True)
class BatchSettings:
    """What decides the windows. Exactly one of micro_batch_size and micro_batch_tokens, and of epochs and max_steps."""

    micro_batch_size: int | None
    micro_batch_tokens: int | None
    gradient_accumulation_steps: int
    max_length: int
    packing: bool
    shuffle: bool
    seed: int
    epochs: float | None
    max_steps: int | None
    pad_id: int
    end_to_end: bool = (
        False  # unpacked rows of a micro-batch lie in one sequence, as documents of their own: no padding
    )
    reads_source: bool = False  # rows are a source and an answer, each padded by itself


def group_rows(order: Sequence[int], lengths: Sequence[int], settings: BatchSettings) -> list[Group]:
    """Sequences of one row each, or packs. `lengths` are those of `order`."""
    if not settings.packing:
        return [(int(row),) for row in order]
    return [tuple(int(order[position]) for position in pack) for pack in first_fit(lengths, settings.max_length)]


def part_lengths(lengths: NDArray[np.int64], supervised: NDArray[np.int64], reads_source: bool) -> list[Widths]:
    """Tokens of each part of a row that is padded by itself: of the row, or of its source and its answer."""
    if not reads_source:
        return [(length,) for length in lengths.tolist()]
    return list(zip((lengths - supervised - 1).tolist(), supervised.tolist(), strict=True))


def padded_tokens(widths: Sequence[Widths]) -> int:
    """Tokens of a micro-batch of such sequences, padding included."""
    together: int = sum(max(part) for part in zip(*widths, strict=True))
    return len(widths) * together


def cut_micro_batches(groups: Sequence[Group], lengths: Sequence[Widths], settings: BatchSettings) -> list[MicroBatch]:
    """Consecutive groups: micro_batch_size of them, or as many as fit micro_batch_tokens padded tokens (at least 1)."""
    if settings.micro_batch_size is not None:
        size = settings.micro_batch_size
        return [tuple(groups[start : start + size]) for start in range(0, len(groups), size)]
    budget = settings.micro_batch_tokens or 1
    batches: list[MicroBatch] = []
    current: list[Group] = []
    widest: Widths = (0, 0)
    for group, length in zip(groups, lengths, strict=True):
        wider = tuple(map(max, widest, length))
        if current and sum(wider) * (len(current) + 1) > budget:
            batches.append(tuple(current))
            current, wider = [], length
        current.append(group)
        widest = wider
    return [*batches, tuple(current)] if current else batches


class TrainingWindows:
    """A WindowSource over rows in memory. Micro-batch j of a window goes to rank j % world."""

    def __init__(
        self,
        rows: EncodedRows,
        settings: BatchSettings,
        *,
        rank: int = 0,
        world: int = 1,
        draws: tuple[Share, ...] | None = None,
    ) -> None:
        if len(rows) == 0:
            raise DataError(
                "there are no rows to train on", "see the dropped rows, or name other sources in data.train"
            )
        self._rows, self._settings = rows, settings
        self._rank, self._world = rank, world
        self._shares = draws or (Share(0, len(rows)),)
        self._lengths = np.asarray(rows.lengths)  # (rows,)
        self._supervised = np.asarray(rows.supervised) if settings.reads_source else self._lengths  # (rows,)
        self._steps_of: list[int] = []  # optimizer steps of each epoch that was cut
        self._last: tuple[int, list[MicroBatch]] | None = None
        self.micro_batches_per_epoch = len(self.micro_batches(0))
        self.steps_per_epoch = self._epoch_steps(0)
        if self.steps_per_epoch == 0:
            raise DataError("an epoch holds no row at these weights", "raise data.train[].weight")
        self.steps = settings.max_steps if settings.max_steps is not None else self._count_steps(settings.epochs or 1.0)

    def micro_batches(self, epoch: int) -> list[MicroBatch]:
        """Every micro-batch of an epoch, in order."""
        if self._last is None or self._last[0] != epoch:
            settings = self._settings
            order = epoch_rows(self._shares, seed=settings.seed, epoch=epoch, shuffle=settings.shuffle)
            groups = group_rows(order.tolist(), self._lengths[order].tolist(), settings)
            lengths = self._widths(groups) if settings.micro_batch_tokens else []
            self._last = epoch, cut_micro_batches(groups, lengths, settings)
        return self._last[1]

    def _widths(self, groups: Sequence[Group]) -> list[Widths]:
        if not self._settings.reads_source:
            return [(int(self._lengths[list(group)].sum()),) for group in groups]
        order = [group[0] for group in groups]  # never packed
        return part_lengths(self._lengths[order], self._supervised[order], reads_source=True)

    def windows(self, first_step: int) -> Iterator[Window]:
        """This rank's share of each step from `first_step` on, up to `steps`."""
        epoch, before = 0, 0
        while before + self._epoch_steps(epoch) <= first_step:
            before += self._epoch_steps(epoch)
            epoch += 1
        for step in range(first_step, self.steps):
            if step - before == self._epoch_steps(epoch):
                before, epoch = step, epoch + 1
            yield self._window(step, epoch, step - before)

    def _window(self, step: int, epoch: int, position: int) -> Window:
        size = self._settings.gradient_accumulation_steps
        micro_batches = self.micro_batches(epoch)[position * size : (position + 1) * size]
        indices = tuple(range(self._rank, len(micro_batches), self._world))
        batches = tuple(self._collate(micro_batches[index]) for index in indices)
        return Window(step, epoch + (position + 1) / self._epoch_steps(epoch), indices, batches)

    def _collate(self, micro_batch: MicroBatch) -> Batch:
        settings = self._settings
        return collate(
            self._rows,
            micro_batch,
            pad_id=settings.pad_id,
            packed=settings.packing,
            end_to_end=settings.end_to_end,
        )

    def _epoch_steps(self, epoch: int) -> int:
        """Steps of an epoch: the last, partial window counts. Packs differ from epoch to epoch, so steps may."""
        while len(self._steps_of) <= epoch:
            if self._steps_of and not self._varies:
                self._steps_of.append(self._steps_of[0])
                continue
            micro_batches = self.micro_batches(len(self._steps_of))
            self._steps_of.append(math.ceil(len(micro_batches) / self._settings.gradient_accumulation_steps))
        return self._steps_of[epoch]

    @property
    def _varies(self) -> bool:
        settings = self._settings
        drawn = any(share.weight != int(share.weight) for share in self._shares)
        return (settings.shuffle or drawn) and (settings.packing or settings.micro_batch_tokens is not None)

    def _count_steps(self, epochs: float) -> int:
        """Whole epochs, and of the last one the part asked for, rounded up."""
        whole = int(epochs)
        steps = sum(self._epoch_steps(epoch) for epoch in range(whole))
        part = epochs - whole
        return steps + (math.ceil(part * self._epoch_steps(whole) - STEP_ROUNDING) if part else 0)


def evaluation_batches(
    rows: EncodedRows, *, batch_size: int, pad_id: int, packing: bool = False, max_length: int | None = None
) -> Iterator[Batch]:
    """Every row once, longest first (least padding, and a batch that does not fit fails at once)."""
    lengths = np.asarray(rows.lengths)  # (rows,)
    order = np.argsort(-lengths, kind="stable")  # (rows,)
    groups: list[Group] = [(int(row),) for row in order]
    if packing:
        capacity = max_length or int(lengths.max(initial=1))
        groups = [tuple(int(order[at]) for at in pack) for pack in first_fit(lengths[order].tolist(), capacity)]
    for start in range(0, len(groups), batch_size):
        yield collate(rows, groups[start : start + batch_size], pad_id=pad_id, packed=packing)


def longest_batch(rows: EncodedRows, settings: BatchSettings) -> Batch:
    """A micro-batch as large as any that an epoch can produce: the longest rows, or packs filled to the brim."""
    lengths = np.asarray(rows.lengths)  # (rows,)
    if settings.packing:
        capacity = min(settings.max_length, int(lengths.sum()))
        count = settings.micro_batch_size or max((settings.micro_batch_tokens or 1) // capacity, 1)
        return filled_batch(rows, settings, min(count, len(rows)), capacity)
    if settings.end_to_end and settings.micro_batch_tokens is not None:
        return filled_batch(
            rows, settings, 1, min(max(settings.micro_batch_tokens, int(lengths.max())), int(lengths.sum()))
        )
    order = np.argsort(-lengths, kind="stable")  # (rows,), longest first
    count, first = settings.micro_batch_size or 1, 0
    if settings.micro_batch_tokens is not None:
        widths = lengths[order]  # (rows,)
        fitting = np.maximum(settings.micro_batch_tokens // widths, 1)  # (rows,)
        counts = np.minimum(fitting, len(order) - np.arange(len(order)))  # rows at least as short
        first = int(np.argmax(counts * widths))
        count = int(counts[first])
    chosen = [(int(row),) for row in order[first : first + count]]
    return collate(rows, chosen, pad_id=settings.pad_id, packed=False, end_to_end=settings.end_to_end)


def filled_batch(rows: EncodedRows, settings: BatchSettings, count: int, capacity: int) -> Batch:
    """`count` sequences of exactly `capacity` tokens, of the longest rows; the last row of each is cut to fit."""
    order = np.argsort(-np.asarray(rows.lengths), kind="stable").tolist()
    sequences: list[list[EncodedRow]] = []
    indices: list[Group] = []
    position = 0
    for number in range(count):
        sequence, used, room = [], [], capacity
        while room:
            row = rows[order[position % len(order)]]
            kept = EncodedRow(row.ids[:room], row.trained[:room], row.origin)
            sequence.append(kept)
            used.append(order[position % len(order)])
            room -= len(kept.ids)
            position += 1
        sequences.append([_one_part(sequence, number)] if settings.reads_source and count > 1 else sequence)
        indices.append(tuple(used))
    return collate_rows(sequences, indices, pad_id=settings.pad_id, packed=True)


def _one_part(sequence: Sequence[EncodedRow], number: int) -> EncodedRow:
    """Nearly all of it source in the first of several, answer in the others: either part is padded to the longest."""
    ids = np.concatenate([row.ids for row in sequence])  # (T,)
    trained = np.arange(len(ids)) >= (len(ids) - 1 if number == 0 else 2)  # (T,)
    return EncodedRow(ids, trained, sequence[0].origin)
