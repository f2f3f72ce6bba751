"""Rows to tensors: one micro-batch, right-padded, or end to end without padding.

Comes in: rows, grouped into sequences of one row or of several (packs).  Goes out: Batch.  Next: batches.py.
Padding is masked by length, never by id.  Position ids restart at 0 for every segment and for the padding tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tunekit.contracts import IGNORED, Batch, EncodedRow, EncodedRows


def collate(
    rows: EncodedRows, groups: Sequence[Sequence[int]], *, pad_id: int, packed: bool, end_to_end: bool = False
) -> Batch:
    """The batch whose sequence b holds the rows groups[b] one after the other; `end_to_end`: all in one sequence."""
    groups = [[index for group in groups for index in group]] if end_to_end else groups
    return collate_rows([[rows[index] for index in group] for group in groups], groups, pad_id=pad_id, packed=packed)


def collate_rows(
    sequences: Sequence[Sequence[EncodedRow]], row_ids: Sequence[Sequence[int]], *, pad_id: int, packed: bool
) -> Batch:
    """The batch of given rows."""
    lengths = tuple(sum(len(row.ids) for row in sequence) for sequence in sequences)
    shape = (len(sequences), max(lengths, default=0))
    input_ids = np.full(shape, pad_id, dtype=np.int64)  # (B, T)
    labels = np.full(shape, IGNORED, dtype=np.int64)  # (B, T)
    position_ids = np.zeros(shape, dtype=np.int64)  # (B, T)
    for number, sequence in enumerate(sequences):
        start = 0
        for row in sequence:
            stop = start + len(row.ids)
            input_ids[number, start:stop] = row.ids
            labels[number, start:stop] = np.where(row.trained, row.ids, IGNORED)
            labels[number, start] = IGNORED  # nothing before it predicts a segment's first token
            position_ids[number, start:stop] = np.arange(stop - start)
            start = stop
        position_ids[number, start:] = np.arange(shape[1] - start)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(labels),
        lengths=lengths,
        packed=packed,
        origins=tuple(tuple(row.origin for row in sequence) for sequence in sequences),
        row_ids=tuple(tuple(int(index) for index in group) for group in row_ids),
    )
