"""The rows of one source, encoded by several processes: the same rows in the same order as by one.

Comes in: a source that is being read.  Goes out: Blocks of encoded rows.  Next: load.py.
Child k of n reads the whole source and encodes blocks k, k + n, ...; their parent takes the blocks in order.  Where a
row is wrong, or a child dies, the blocks end early: the parent goes on from there alone, with its own errors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from tunekit.data.encoding.encode import Encoded, EncodeOptions, MakeExample, SourceCounts, encode_rows
from tunekit.data.reading.data_file import inspect_file
from tunekit.data.reading.lines import RawRow
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import is_hub_name
from tunekit.data.rendering.render import Renderer
from tunekit.machine.forks import Child, fork_child, usable_cores

BLOCK_ROWS = 64
LEAST_BYTES = 2**19  # half a second of encoding; below, the children's start is felt
KINDS = ("jsonl", "json", "csv")  # read by Python alone: pyarrow's threads do not survive a fork
WAIT_SECONDS = 1.0

OpenRows = Callable[[Problems], Iterator[RawRow]]


@dataclass(frozen=True)
class Block:
    """Rows of a source that lie together, encoded; `last` where the source ends in it."""

    encoded: list[Encoded]
    counts: SourceCounts
    notices: dict[str, int]
    last: bool


def encode_in_parts(
    rows: Iterator[RawRow],
    reopen: OpenRows,
    path: str,
    make_example: MakeExample,
    renderer: Renderer,
    options: EncodeOptions,
    *,
    problems: Problems,
    counts: SourceCounts,
) -> Iterator[Encoded]:
    """encode_rows over `rows`, which lie at `path` and can be opened again."""
    encode = partial(encode_rows, name=path, problems=problems, counts=counts)
    yield from encode(islice(rows, BLOCK_ROWS), make_example, renderer, options)
    done = BLOCK_ROWS
    if not problems.shown and _worth_parts(path):
        with closing(_blocks(done, reopen, make_example, renderer, options, path)) as blocks:
            for block in blocks:
                counts.add(block.counts)
                renderer.notices.update(block.notices)
                yield from block.encoded
                if block.last:
                    return
                done += BLOCK_ROWS
    for _ in islice(rows, done - BLOCK_ROWS):
        pass
    yield from encode(rows, make_example, renderer, options, first_number=done)


def _worth_parts(path: str) -> bool:
    """Whether several processes encode this source sooner than one."""
    if usable_cores() < 2 or is_hub_name(path):
        return False
    file = inspect_file(Path(path))
    return file.kind in KINDS and file.size_bytes >= LEAST_BYTES


def _blocks(
    first_row: int, reopen: OpenRows, make_example: MakeExample, renderer: Renderer, options: EncodeOptions, name: str
) -> Generator[Block]:
    """Blocks from `first_row` on, up to the source's end or to the first that needs this process."""
    number = usable_cores()
    with ExitStack() as stack:
        workers: list[tuple[Child, Connection]] = []
        for place in range(number):
            ours, theirs = Pipe(duplex=False)
            stack.callback(ours.close)
            starts = count(first_row + place * BLOCK_ROWS, number * BLOCK_ROWS)
            child = fork_child(partial(_send_blocks, theirs, starts, reopen, make_example, renderer, options, name))
            theirs.close()
            if child is None:
                return
            stack.callback(child.stop)
            workers.append((child, ours))
        for child, ours in cycle(workers):
            block = _receive(child, ours)
            if block is None:
                return
            yield block
            if block.last:
                return


def _receive(child: Child, connection: Connection) -> Block | None:
    """The child's next block; None where there will be none."""
    try:
        while not connection.poll(WAIT_SECONDS):
            if child.stalled:
                return None
        found: Block | None = connection.recv()
    except (EOFError, OSError):
        return None
    return found


def _send_blocks(
    connection: Connection,
    starts: Iterator[int],
    reopen: OpenRows,
    make_example: MakeExample,
    renderer: Renderer,
    options: EncodeOptions,
    name: str,
) -> None:
    """The child's side: its blocks, then nothing; None for one that it cannot answer for."""
    problems, at = Problems(), 0
    rows, known = reopen(problems), renderer.learned
    for start in starts:
        for _ in islice(rows, start - at):
            pass
        at = start + BLOCK_ROWS
        raw = list(islice(rows, BLOCK_ROWS))
        counts = SourceCounts()
        renderer.notices.clear()
        given = (raw, make_example, renderer, options)
        encoded = list(encode_rows(*given, name=name, problems=problems, counts=counts, first_number=start))
        if problems.shown or renderer.learned != known:  # what it learned might have changed the blocks before
            connection.send(None)
            return
        last = len(raw) < BLOCK_ROWS
        connection.send(Block(encoded, counts, dict(renderer.notices), last))
        if last:
            return
