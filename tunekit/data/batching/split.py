"""Splits a micro-batch into two halves. The losses and gradients of the halves add up to the
loss and gradient of the micro-batch."""

from tunekit.contracts import Batch, Row, RowKind


def split_batch(batch: Batch, kind: RowKind) -> tuple[Batch, Batch] | None:
    """The two halves of a batch. A single sequence of packed rows is split between two rows; None for a single row.

    Each half is padded to its own longest sequence. The rows keep their order.
    """
    sequences = batch.sequences
    if len(sequences) > 1:
        middle = len(sequences) // 2
        return kind.collate(sequences[:middle]), kind.collate(sequences[middle:])
    rows, size = sequences[0], batch.tokens
    if len(rows) < 2:
        return None
    middle = min(range(1, len(rows)), key=lambda at: abs(sum(row.size for row in rows[:at]) - size / 2))
    return kind.collate([rows[:middle]]), kind.collate([rows[middle:]])


def cut_batch(batch: Batch, kind: RowKind, *, sequences: int | None = None, size: int | None = None) -> Batch:
    """The first `sequences` sequences of a batch, each cut after `size` tokens."""
    shortened: list[list[Row]] = []
    for rows in batch.sequences[:sequences]:
        left, cut = batch.tokens if size is None else size, []
        for row in rows:
            cut += [kind.cut(row, 0, min(row.size, left))] if left else []
            left -= min(row.size, left)
        shortened.append(cut)
    return kind.collate(shortened)
