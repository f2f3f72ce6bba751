"""Batches of rows in memory: an epoch is cut into packs, then micro-batches, then optimizer steps.

The order depends only on (rows, settings, seed), not on the number of ranks. `steps(first_step)` yields exactly the
steps that an uninterrupted run has from this step on.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle
from typing import TypeVar

import numpy as np

from tunekit.contracts import Batch, Row, RowKind, Rows, StepBatches
from tunekit.data.batching.order import Share, by_kind, epoch_rows
from tunekit.data.batching.pack import first_fit
from tunekit.errors import DataError

Group = tuple[int, ...]  # the rows of one sequence: one row, or a pack
MicroBatch = tuple[Group, ...]
Sizes = tuple[int, ...]  # the size of each part of a sequence
Cut = TypeVar("Cut")  # the type of a group of rows
STEP_ROUNDING = 1e-9  # tolerance for rounding: 0.1 * 30 is not exactly 3


@dataclass(frozen=True)
class BatchSettings:
    """The settings that decide how rows are batched. Either micro_batch_size or micro_batch_tokens is set, and
    either epochs or max_steps."""

    micro_batch_size: int | None
    micro_batch_tokens: int | None
    gradient_accumulation_steps: int
    max_length: int
    packing: bool
    shuffle: bool
    seed: int
    epochs: float | None
    max_steps: int | None
    updates_per_sampling: int = 1  # consecutive steps with the same rows
    end_to_end: bool = False  # the unpacked rows of a micro-batch form one sequence, as separate documents: no padding
    rank_speeds: tuple[float, ...] = ()  # of each rank; (): equal speeds


def group_rows(order: Sequence[int], lengths: Sequence[int], settings: BatchSettings) -> list[Group]:
    """Sequences of one row; with packing, packs of rows. `order`: row numbers. `lengths`: the rows' lengths."""
    if not settings.packing:
        return [(int(row),) for row in order]
    return [tuple(int(order[position]) for position in pack) for pack in first_fit(lengths, settings.max_length)]


def collate(
    rows: Rows, groups: Sequence[Group], kind: RowKind, *, end_to_end: bool = False, earlier: Counter[int] | None = None
) -> Batch:
    """A batch with the rows of `groups`, one sequence each. `end_to_end`: put all rows into one sequence. `earlier`:
    how often each row is in the step's earlier batches; this batch's rows are added to it."""
    groups = [tuple(index for group in groups for index in group)] if end_to_end else groups
    counts = Counter[int]() if earlier is None else earlier

    def row(index: int) -> Row:
        counts[index] += 1
        return rows[index] if counts[index] == 1 else replace(rows[index], occurrence=counts[index] - 1)

    return kind.collate([[row(index) for index in group] for group in groups])


def cut_micro_batches(
    groups: Iterable[Cut], sizes_of: Callable[[Cut], Sizes], settings: BatchSettings
) -> Iterator[tuple[Cut, ...]]:
    """Micro-batches of consecutive groups. Each has micro_batch_size groups, or as many groups (at least 1) as fit into
    micro_batch_tokens, padding included."""
    budget = settings.micro_batch_tokens
    current: list[Cut] = []
    widest: Sizes = ()
    for group in groups:
        sizes = () if budget is None else sizes_of(group)
        wider = tuple(map(max, widest, sizes)) if current else sizes
        full = len(current) == settings.micro_batch_size if budget is None else sum(wider) * (len(current) + 1) > budget
        if current and full:
            yield tuple(current)
            current, wider = [], sizes
        current.append(group)
        widest = wider
    if current:
        yield tuple(current)


def cut_by_key(
    micro_batches: Sequence[Sequence[Cut]],
    key_of: Callable[[Cut], bytes],
    sizes_of: Callable[[Cut], Sizes],
    settings: BatchSettings,
) -> list[tuple[Cut, ...]]:
    """Form new micro-batches from the rows of a step, so that all groups of a micro-batch have the same key."""
    keys: dict[bytes, list[Cut]] = {}
    for group in chain.from_iterable(micro_batches):
        keys.setdefault(key_of(group), []).append(group)
    return [cut for groups in keys.values() for cut in cut_micro_batches(groups, sizes_of, settings)]


def dealt(count: int, rank: int, world: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """The indices of those of a step's `count` micro-batches that this rank computes.

    Each micro-batch goes to the rank that would finish it first. At equal speeds, micro-batch j goes to rank j % world.
    `speeds`: numbers of another count than `world` mean equal speeds.
    """
    if len(speeds) != world:
        return tuple(range(rank, count, world))
    counts, indices = [0] * world, []
    for index in range(count):
        owner = min(range(world), key=lambda each: (counts[each] + 1) / speeds[each])
        counts[owner] += 1
        if owner == rank:
            indices.append(index)
    return tuple(indices)


class StoredSteps:
    """A StepSource over rows in memory. `dealt` decides which rank computes which micro-batches of a step."""

    def __init__(
        self,
        rows: Rows,
        kind: RowKind,
        settings: BatchSettings,
        *,
        rank: int = 0,
        world: int = 1,
        draws: tuple[Share, ...] | None = None,
    ) -> None:
        if len(rows) == 0:
            how = "see the warnings about dropped rows, or name other sources in data.train"
            raise DataError("there are no rows to train on", how)
        self._rows, self._kind, self._settings = rows, kind, settings
        self._rank, self._world = rank, world
        self._shares = draws or (Share(0, len(rows)),)
        self._sizes = np.asarray(rows.sizes)  # (rows, sizes)
        self._lengths = self._sizes.sum(axis=1)  # (rows,)
        self._hashes = self._read_hashes()
        self.left_out = 0  # rows of the last computed epoch that fit into no step
        self._steps_of: list[int] = []  # number of optimizer steps of each epoch so far
        self._last: tuple[int, list[MicroBatch]] | None = None
        self.micro_batches_per_epoch = len(self.micro_batches(0))
        self.steps_per_epoch = self._epoch_steps(0)
        if self.steps_per_epoch == 0:
            raise DataError("with these weights of the sources, an epoch has no rows", "raise data.train[].weight")
        self.count = settings.max_steps if settings.max_steps is not None else self._count_steps(settings.epochs or 1.0)

    def micro_batches(self, epoch: int) -> list[MicroBatch]:
        """All micro-batches of an epoch, in order."""
        if self._last is None or self._last[0] != epoch:
            settings = self._settings
            order = epoch_rows(self._shares, seed=settings.seed, epoch=epoch, shuffle=settings.shuffle)
            if self._hashes is not None:
                rows = by_kind(order.tolist(), *self._hashes, shuffle=settings.shuffle)
                self.left_out, order = len(order) - len(rows), np.array(rows, dtype=np.int64)
            groups = group_rows(order.tolist(), self._lengths[order].tolist(), settings)
            self._last = epoch, list(cut_micro_batches(groups, self._sizes_of, settings))
        return self._last[1]

    def _read_hashes(self) -> tuple[dict[int, frozenset[int]], int, list[int]] | None:
        """The hashes of each row, the number of rows of a step, and the kind of each row; None if rows of a step may
        have equal hashes, or if the number of rows is not fixed. Sources whose rows have the same numbers of hashes are
        of one kind. Raises: DataError if there are too few rows of a kind for a step."""
        settings, part = self._settings, self._kind.layout.distinct
        if part is None or settings.micro_batch_size is None:
            return None
        hashes = {index: frozenset(self._rows[index].parts[part].tolist()) for index in range(len(self._rows))}
        size, kinds = settings.micro_batch_size * settings.gradient_accumulation_steps, [0] * len(self._rows)
        numbers = dict[frozenset[int], int]()
        for share in self._shares:
            source = frozenset(len(hashes[index]) for index in range(share.start, share.stop))
            kinds[share.start : share.stop] = [numbers.setdefault(source, len(numbers))] * (share.stop - share.start)
        fewest = min(Counter(kinds).values())
        if len(set(kinds)) > 1 and fewest < size:
            what = (
                f"a source has only {fewest:,} rows with its number of texts, and a step has {size:,} rows of one kind"
            )
            how = "add rows to this source, or lower training.gradient_accumulation_steps"
            raise DataError(what, how, key="data.train")
        return hashes, size, kinds

    def _sizes_of(self, group: Group) -> Sizes:
        return self._kind.layout.padded(self._sizes[list(group)].sum(axis=0).tolist())

    def after(self, first_step: int) -> Iterator[StepBatches]:
        """Yields this rank's micro-batches of each step, from `first_step` on, up to `steps`."""
        epoch, before = 0, 0
        while before + self._epoch_steps(epoch) <= first_step:
            before += self._epoch_steps(epoch)
            epoch += 1
        for step in range(first_step, self.count):
            if step - before == self._epoch_steps(epoch):
                before, epoch = step, epoch + 1
            yield self._make_step(step, epoch, step - before)

    def _make_step(self, step: int, epoch: int, position: int) -> StepBatches:
        micro_batches = self._step(epoch, position // self._settings.updates_per_sampling)
        indices = dealt(len(micro_batches), self._rank, self._world, self._settings.rank_speeds)
        end_to_end = self._settings.end_to_end
        earlier, local, batches = Counter[int](), set(indices), []
        for at, groups in enumerate(micro_batches):  # also those of other ranks: a row may be in a step twice
            if at in local:
                batches.append(collate(self._rows, groups, self._kind, end_to_end=end_to_end, earlier=earlier))
            else:
                earlier.update(chain.from_iterable(groups))
        return StepBatches(
            step, epoch + (position + 1) / self._epoch_steps(epoch), indices, tuple(batches), self._settings.seed
        )

    def steps_of(self, epoch: int) -> Iterator[Sequence[MicroBatch]]:
        """The micro-batches of each step of an epoch; consecutive steps with the same rows count once."""
        size = self._settings.gradient_accumulation_steps
        yield from (self._step(epoch, place) for place in range(math.ceil(len(self.micro_batches(epoch)) / size)))

    def _step(self, epoch: int, place: int) -> Sequence[MicroBatch]:
        size = self._settings.gradient_accumulation_steps
        micro_batches = self.micro_batches(epoch)[place * size : (place + 1) * size]
        if self._kind.layout.batch_key is None:
            return micro_batches
        return cut_by_key(micro_batches, self._key_of, self._sizes_of, self._settings)

    def _key_of(self, group: Group) -> bytes:
        return self._kind.layout.key_of(self._rows[group[0]])

    def _epoch_steps(self, epoch: int) -> int:
        """Number of steps of an epoch, including the last, partial one. With packing, the
        number can differ between epochs.
        """
        while len(self._steps_of) <= epoch:
            if self._steps_of and not self._varies:
                self._steps_of.append(self._steps_of[0])
                continue
            micro_batches = self.micro_batches(len(self._steps_of))
            steps = math.ceil(len(micro_batches) / self._settings.gradient_accumulation_steps)
            self._steps_of.append(steps * self._settings.updates_per_sampling)
        return self._steps_of[epoch]

    @property
    def _varies(self) -> bool:
        settings = self._settings
        drawn = any(share.weight != int(share.weight) for share in self._shares)
        uneven = settings.packing or settings.micro_batch_tokens is not None or self._hashes is not None
        return (settings.shuffle or drawn) and uneven

    def _count_steps(self, epochs: float) -> int:
        """Number of steps of `epochs` epochs; the fraction of the last epoch is rounded up to whole steps."""
        complete = int(epochs)
        steps = sum(self._epoch_steps(epoch) for epoch in range(complete))
        part = epochs - complete
        return steps + (math.ceil(part * self._epoch_steps(complete) - STEP_ROUNDING) if part else 0)


def evaluation_batches(rows: Rows, kind: RowKind, *, batch_size: int) -> Iterator[Batch]:
    """Batches of all rows, longest rows first. This order keeps padding small. If memory is too small, already the
    first batch fails.
    """
    order = np.argsort(-np.asarray(rows.lengths), kind="stable")  # (rows,)
    waiting: dict[bytes, list[Group]] = {}
    for index in order.tolist():
        key = b"" if kind.layout.batch_key is None else kind.layout.key_of(rows[index])
        some = waiting.setdefault(key, [])
        some.append((index,))
        if len(some) == batch_size:
            yield collate(rows, some, kind)
            some.clear()
    for some in filter(None, waiting.values()):
        yield collate(rows, some, kind)


def largest_evaluation_batch(rows: Rows, kind: RowKind, *, batch_size: int) -> Batch:
    """The evaluation batch that needs the most memory."""
    if kind.layout.batch_key is None:
        return next(evaluation_batches(rows, kind, batch_size=batch_size))
    largest = rows[int(np.argmax(rows.lengths))]
    return kind.collate([[largest]] * min(batch_size, len(rows)))


def filled_batch(rows: Rows, kind: RowKind, settings: BatchSettings) -> Batch:
    """A micro-batch whose sequences have exactly max_length tokens, made from the longest rows. It needs at least as
    much memory as any micro-batch of a stream, whose rows are not known in advance."""
    capacity = settings.max_length
    count = settings.micro_batch_size or max((settings.micro_batch_tokens or 1) // capacity, 1)
    longest = np.argsort(-np.asarray(rows.lengths), kind="stable").tolist()
    source = (rows[index] for index in cycle(longest))
    parts = kind.layout.sizes
    filled = [kind.fill(source, capacity, min(number, parts - 1)) for number in range(count)]
    if kind.layout.batch_key is not None:  # a batch has one key, so the largest sequence is repeated
        filled = [max(filled, key=lambda rows: rows[0].size)] * count
    return kind.collate(filled)
