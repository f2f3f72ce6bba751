"""A micro-batch cut into two that hold the same documents: its loss and its gradient are the sum of theirs.

Comes in: a Batch too large for the memory there is.  Goes out: two smaller ones.  Next: memory/splitting.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tunekit.contracts import Batch


def split_batch(batch: Batch) -> tuple[Batch, Batch] | None:
    """The first and the second half: of several rows by rows, of one packed row by documents; None for one document.

    Halves are as wide as their longest row. Rows and documents keep their order, their labels and their positions, so
    that every supervised token is in exactly one half.
    """
    count = len(batch.lengths)
    if count > 1:
        middle = count // 2
        return _rows(batch, slice(0, middle)), _rows(batch, slice(middle, count))
    starts = _document_starts(batch)
    if len(starts) < 2:
        return None
    half = batch.lengths[0] / 2
    cut = min(range(1, len(starts)), key=lambda document: abs(starts[document] - half))
    return _documents(batch, cut, slice(0, starts[cut])), _documents(batch, cut, slice(starts[cut], batch.lengths[0]))


def _rows(batch: Batch, chosen: slice) -> Batch:
    """Some rows of a batch, without the padding that only the others needed."""
    lengths = batch.lengths[chosen]
    width = max(lengths)
    return replace(
        batch,
        input_ids=batch.input_ids[chosen, :width],
        position_ids=batch.position_ids[chosen, :width],
        labels=batch.labels[chosen, :width],
        lengths=lengths,
        origins=batch.origins[chosen],
        row_ids=batch.row_ids[chosen],
    )


def _document_starts(batch: Batch) -> list[int]:
    """Where the documents of a batch of one row begin; padding is none."""
    positions = batch.position_ids[0, : batch.lengths[0]]  # (T,)
    return [int(start) for start in torch.nonzero(positions == 0)[:, 0]]


def _documents(batch: Batch, cut: int, tokens: slice) -> Batch:
    """The documents before (a slice from 0) or from `cut` on, of a batch of one row."""
    documents = slice(0, cut) if tokens.start == 0 else slice(cut, None)
    return replace(
        batch,
        input_ids=batch.input_ids[:, tokens],
        position_ids=batch.position_ids[:, tokens],
        labels=batch.labels[:, tokens],
        lengths=(tokens.stop - tokens.start,),
        origins=(batch.origins[0][documents],),
        row_ids=(batch.row_ids[0][documents],),
    )
