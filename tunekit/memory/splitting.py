"""If a micro-batch runs out of memory, splits it into two with the same total gradient. Later micro-batches of at least
its size are split too.

A split micro-batch gives the same loss and gradient, except for the order of sums and, with dropout, other masks. After
a failure, the partial gradient is set to zero, and all micro-batches of the step run again. So no second copy of the
gradient is needed.
"""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

from tunekit.contracts import Batch, RowKind
from tunekit.data.batching.split import split_batch
from tunekit.errors import ResourceError, is_out_of_memory
from tunekit.machine.memory import release_cached
from tunekit.records import Reaction

Result = TypeVar("Result")
PIECE_STRIDE = 2**32  # the pieces of a split micro-batch use random numbers of micro-batches beyond any real index
HOW = (
    "lower data.max_length or adapter.r, set memory.gradient_checkpointing: true, or quantize the base with "
    "model.quantization: nf4"
)


def first_line(error: BaseException) -> str:
    """The first line of an error message, without the allocator's tables."""
    return str(error).strip().partition("\n")[0]


def shape_text(batch: Batch) -> str:
    """A micro-batch's shape for messages: 4 x 512 tokens."""
    return f"{len(batch.sequences):,} x {batch.width:,} {size_unit(batch)}"


def size_unit(batch: Batch) -> str:
    """The unit of a micro-batch's size."""
    return "tokens" if batch.line_size is None else "positions"


class Splitting:
    """Splits micro-batches with at least `tokens` tokens, padding included. `tokens` is None as long as no micro-batch
    has run out of memory."""

    def __init__(self, react: Callable[[Reaction], None] | None = None, tokens: int | None = None) -> None:
        self.tokens = tokens
        self.running: Batch | None = None  # the micro-batch that is running, blamed if memory runs out
        self._react = react

    def pieces(self, kind: RowKind, batch: Batch) -> list[Batch]:
        """The parts of a micro-batch, each smaller than any micro-batch that failed. A micro-batch of a single document
        is not split."""
        if self.tokens is None or batch.padded < self.tokens:
            return [batch]
        halves = split_batch(batch, kind)
        return [batch] if halves is None else [piece for half in halves for piece in self.pieces(kind, half)]

    def shrink(self, kind: RowKind, reason: str, step: int) -> None:
        """Record that a micro-batch has failed: micro-batches of at least its size are split from now on. Raises:
        ResourceError if this micro-batch cannot be split."""
        failed, self.running = self.running, None
        if failed is None or split_batch(failed, kind) is None:
            raise document_too_large(failed, reason)
        self.tokens = min(failed.padded, self.tokens or failed.padded)
        collect_failed()
        if self._react is not None:
            what = f"a micro-batch of {shape_text(failed)} ran out of memory"
            how = (
                f"split in two; from now on, micro-batches of {self.tokens:,} or more {size_unit(failed)}, padding "
                "included, are split"
            )
            self._react(Reaction(what, how, step))


def compute_in_parts(
    batches: Sequence[Batch],
    compute: Callable[[Sequence[Batch]], list[Result]],
    join: Callable[[Sequence[Batch], Sequence[Result]], Result],
    kind: RowKind,
    on_split: Callable[[str], None],
) -> list[Result]:
    """Call `compute`, which returns one result for each batch. If memory runs out, compute half as many batches at
    once; a single batch is cut into two halves, and `join` makes its result from those of the halves.

    `on_split`: called with the size of what ran out of memory.
    Raises: ResourceError if a single document does not fit into memory.
    """
    try:
        return compute(batches)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Not inside `except`: the error keeps the failed attempt's tensors alive there.
    halves = split_batch(batches[0], kind) if len(batches) == 1 else None
    if halves is None and len(batches) == 1:
        raise document_too_large(batches[0], reason)
    middle = len(batches) // 2
    parts = [[half] for half in halves] if halves else [batches[:middle], batches[middle:]]
    on_split(f"a batch of {shape_text(batches[0])}" if halves else f"{len(batches):,} batches together")
    collect_failed()
    results = [result for part in parts for result in compute_in_parts(part, compute, join, kind, on_split)]
    return [join(halves, results)] if halves else results


def collect_failed() -> None:
    """Free the memory of a failed attempt: graphs in reference cycles, and memory that the device's allocator has
    cached."""
    gc.collect()
    release_cached()


def document_too_large(batch: Batch | None, reason: str) -> ResourceError:
    """The error for a micro-batch that cannot be split further."""
    if batch is None:
        return ResourceError(f"out of memory ({reason})", HOW)
    row = batch.rows[0]
    return ResourceError(f"out of memory for a single document of size {row.size:,} from {row.origin} ({reason})", HOW)
