"""Rows that are decoded in one batch with a common key-value cache, and can join and leave at any token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby, islice

import torch
from torch import Tensor

from tunekit.model.load import LoadedModel
from tunekit.model.text.continuation import DecoderRow, States
from tunekit.model.text.prefill import Forward, Prefill, shared_prefill
from tunekit.model.text.slots import Columns, SlotMemory

# Makes a context manager that activates the named adapters: one name per row, or one for all rows.
Using = Callable[[Sequence[str | None]], AbstractContextManager[object]]


class SlotBatch:
    """Rows that share one key-value cache. `rows`: the rows in the order of their slots in the cache. Rows that one
    forward can contain are next to each other."""

    def __init__(self, model: LoadedModel, pad_id: int, slots: int, tokens: int, using: Using) -> None:
        self.model, self.pad_id, self.using = model, pad_id, using
        self.rows: list[DecoderRow] = []
        self.columns = Columns(slots, tokens)
        self.slots = SlotMemory(model, self.columns)
        self._forward = Forward(model)
        # the last prompts; kept when they are complete, because equal prompts may follow
        self._prefill: Prefill | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the key-value cache."""
        return self.slots.nbytes

    def logits(self) -> Tensor:
        """Logits (B, V) float32 of the next token of each row."""
        columns, results = self.columns, []
        if columns.end == columns.capacity:
            self._shift(-min(row.offset for row in self.rows))
        columns.start = min(row.offset for row in self.rows)
        self._sort()
        for first, rows in self._groups():
            columns.rows = slice(first, first + len(rows))
            with self.using([row.continuation.adapter for row in rows]):
                results.append(self._forward(*self._inputs(rows), self.slots)[:, -1].float())
        columns.end += 1
        for row in self.rows:
            row.position += 1
        return results[0] if len(results) == 1 else torch.cat(results)

    def admit(self, waiting: Sequence[DecoderRow], tokens: int) -> list[tuple[DecoderRow, Tensor]]:
        """Compute about `tokens` tokens of waiting prompts, or fewer if no slot is free. Returns the rows whose prompts
        are now in the cache, each with the logits (V,) of its first new token."""
        joined, prefill = dict[DecoderRow, Tensor](), self._prefill
        if prefill is not None and not (prefill.is_complete or any(row.key in prefill.places for row in waiting)):
            self._prefill = None  # all its rows were cancelled
        while True:
            remaining = [row for row in islice(waiting, 2 * self.columns.slots) if row not in joined]
            joined |= self._join(remaining)
            remaining = [row for row in remaining if row not in joined]
            room = self.columns.slots - len(self.rows)
            if tokens <= 0 or not room:
                return list(joined.items())
            if self._prefill is None or self._prefill.is_complete:
                if not remaining:
                    return list(joined.items())
                rows = shared_prefill(remaining, room, tokens)
                with self.using([row.continuation.adapter for row in rows]):  # it may have its own embeddings
                    self._prefill = Prefill(self._forward, self.model, rows, self.pad_id)
            with self.using(self._prefill.adapters):
                tokens -= self._prefill.advance(tokens)

    def remove(self, row: DecoderRow) -> None:
        """Remove a row. The last row moves into the free slot."""
        slot, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            self._copy(len(self.rows), slot, last.offset)
            self.rows[slot] = last

    def forget(self, adapter: str | None) -> None:
        """Drop the results computed with an adapter, before its weights change."""
        if self._prefill is not None and adapter in self._prefill.adapters:
            self._prefill = None

    def states(self, row: DecoderRow) -> States | None:
        """Copies of the row's keys and values; None if it has virtual tokens."""
        wanted = row.continuation
        if wanted.virtual_tokens:
            return None
        layers = self.slots.read(self.rows.index(row), row.offset, self.columns.end)
        return States(tuple([*wanted.prompt, *row.tokens][: self.columns.end - row.offset]), layers)

    def _inputs(self, rows: Sequence[DecoderRow]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs of the next forward: the last token of each row, the mask of cached tokens, and the positions."""
        columns, device = self.columns, self.model.device
        tokens = torch.tensor([[row.tokens[-1]] for row in rows], device=device)  # (B, 1)
        positions = torch.tensor([[row.position] for row in rows], device=device)  # (B, 1)
        offsets = torch.tensor([[row.offset] for row in rows], device=device)  # (B, 1)
        visible = torch.arange(columns.start, columns.end + 1, device=device) >= offsets  # (B, columns)
        return {"input_ids": tokens}, visible.to(torch.int64), positions

    def _join(self, waiting: Sequence[DecoderRow]) -> dict[DecoderRow, Tensor]:
        """Start the waiting rows whose prompts are computed: copy the keys and values of each prompt into a free slot.
        Returns the started rows, each with the logits (V,) of its first new token."""
        prefill, joined = self._prefill, dict[DecoderRow, Tensor]()
        if prefill is None or not prefill.is_complete:
            return joined
        for row in waiting:
            place = prefill.places.get(row.key)
            if place is None or len(self.rows) == self.columns.slots:
                continue
            length = prefill.length(row)
            self.columns.end = self.columns.end if self.rows else 0
            self._shift(max(length - self.columns.end, 0))
            self.rows.append(row)
            slot, end = len(self.rows) - 1, self.columns.end
            self.slots.copy(slot, end, prefill.slots, place, prefill.columns.end, length)
            row.offset, row.position, row.prompt_scores = end - length, length, prefill.scores
            joined[row] = prefill.logits[place].float()
        return joined

    def _sort(self) -> None:
        """Sort the rows so that the rows of one forward are next to each other."""
        groups = [row.group for row in self.rows]
        order = [group for group in dict.fromkeys(groups) for _ in range(groups.count(group))]
        for slot, group in enumerate(order):
            if groups[slot] != group:
                other = max(place for place, candidate in enumerate(groups) if candidate == group)
                self._swap(slot, other)
                groups[slot], groups[other] = group, groups[slot]

    def _swap(self, slot: int, other: int) -> None:
        """Exchange the slots of two rows, with their keys and values."""
        first, second = self.rows[slot], self.rows[other]
        states = self.slots.read(slot, first.offset, self.columns.end)
        self._copy(other, slot, second.offset)
        self.slots.put(states, other, first.offset)
        self.rows[slot], self.rows[other] = second, first

    def _copy(self, source: int, target: int, offset: int) -> None:
        end = self.columns.end
        self.slots.copy(target, end, self.slots, source, end, end - offset)

    def _shift(self, columns: int) -> None:
        """Move the keys and values of all rows by `columns` columns of the cache, to earlier columns if negative."""
        if columns:
            self.slots.shift(len(self.rows), min((row.offset for row in self.rows), default=0), columns)
            for row in self.rows:
                row.offset += columns

    def _groups(self) -> Iterator[tuple[int, list[DecoderRow]]]:
        """Yield the rows of each forward, with the slot number of the first row."""
        first = 0
        for _, group in groupby(self.rows, key=lambda row: row.group):
            rows = list(group)
            yield first, rows
            first += len(rows)
