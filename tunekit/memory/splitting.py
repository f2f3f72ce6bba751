"""Micro-batches that ran out of memory, cut in two with the same gradient, and remembered.

Comes in: a window's micro-batches and a way to run them.  Goes out: the pieces that fit; a Reaction.

The sums of a split micro-batch are those of the whole one, in another order. The gradient that a failed attempt left
half made is cleared and the window runs again from its first micro-batch: no second copy of the gradient is kept.
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
PIECE_STRIDE = 2**32  # a split micro-batch's pieces draw as micro-batches of their own: no step has so many
HOW = (
    "lower data.max_length or adapter.r, set memory.gradient_checkpointing: true, or quantize the base with "
    "model.quantization: nf4"
)


def first_line(error: BaseException) -> str:
    """What an error says, without the allocator's tables."""
    return str(error).strip().partition("\n")[0]


def shape_text(batch: Batch) -> str:
    """A micro-batch as a person counts it: 4 x 512 tokens."""
    return f"{len(batch.sequences):,} x {batch.width:,} {counted(batch)}"


def counted(batch: Batch) -> str:
    """What the size of a micro-batch counts."""
    return "tokens" if batch.line_size is None else "positions"


class Splitting:
    """Which micro-batches are split: those of at least `tokens` padded tokens, None while none has failed."""

    def __init__(self, react: Callable[[Reaction], None] | None = None, tokens: int | None = None) -> None:
        self.tokens = tokens
        self.running: Batch | None = None  # whoever runs pieces says which, so that a failure is its
        self._react = react

    def pieces(self, kind: RowKind, batch: Batch) -> list[Batch]:
        """The batch, or what it is cut into: none as large as one that failed, unless it is a single document."""
        if self.tokens is None or batch.padded < self.tokens:
            return [batch]
        halves = split_batch(batch, kind)
        return [batch] if halves is None else [piece for half in halves for piece in self.pieces(kind, half)]

    def run(
        self,
        kind: RowKind,
        batches: Sequence[Batch],
        attempt: Callable[[list[list[Batch]]], Result],
        undo: Callable[[], None],
        step: int,
    ) -> Result:
        """What `attempt` gives for the pieces of each batch; repeated, after `undo`, whenever memory runs out.

        `step`: of the Reaction; 0 before the first one.
        Raises: ResourceError where a single document does not fit.
        """
        while True:
            try:
                return attempt([self.pieces(kind, batch) for batch in batches])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Not inside `except`: there the error still holds the failed attempt's tensors.
            self._shrink(kind, reason, step)
            undo()

    def _shrink(self, kind: RowKind, reason: str, step: int) -> None:
        """Split what failed, and all that is as large, from now on."""
        failed, self.running = self.running, None
        if failed is None or split_batch(failed, kind) is None:
            raise document_too_large(failed, reason)
        self.tokens = min(failed.padded, self.tokens or failed.padded)
        collect_failed()
        if self._react is not None:
            what = f"a micro-batch of {shape_text(failed)} ran out of memory"
            how = f"split in two, as all from now on with {self.tokens:,} padded {counted(failed)} or more"
            self._react(Reaction(what, how, step))


def collect_failed() -> None:
    """Let go of what a failed attempt left: graphs in reference cycles, blocks that the device's allocator keeps."""
    gc.collect()
    release_cached()


def document_too_large(batch: Batch | None, reason: str) -> ResourceError:
    """The error for what cannot be split any further."""
    if batch is None:
        return ResourceError(f"out of memory ({reason})", HOW)
    row = batch.rows[0]
    return ResourceError(f"out of memory on a single document of size {row.size:,}, {row.origin} ({reason})", HOW)
