"""Lays out tables for the width of a terminal: words, numbers, keys and paths stay whole, so that they can be read and
copied."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from tunekit.console.text import wrapped

SHORT_CELL = 12  # characters; shorter cells are not wrapped
LONG_WORD = 24  # characters; a longer word of a column other than the first may be broken
GAP, EDGES = 2, 2  # characters between two columns, and at both edges of the table


@dataclass(frozen=True)
class TableColumn:
    """The heading and the cells of a column. The heading may have several lines."""

    head: str
    cells: Sequence[str]
    is_number: bool

    @property
    def size(self) -> int:
        """The width without wrapping."""
        return max(map(cell_len, [*self.head.split("\n"), *self.cells]))

    def minimum(self, longest: int | None) -> int:
        """The smallest width that breaks no word, number or short cell. `longest`: longer words may be broken."""
        cell = max(map(cell_len, self.cells), default=0)
        if not self.is_number and cell > SHORT_CELL:
            cell = max(map(cell_len, " ".join(self.cells).split()), default=0)
        return max([cell if longest is None else min(cell, longest), *map(cell_len, self.head.split())])


def column_widths(columns: Sequence[TableColumn], room: int) -> list[int] | None:
    """The widths of the columns on a line of `room` characters; None if a word, a number or a short cell would have to
    be broken. Room that is left goes to the columns with long texts, in equal parts."""
    sizes = [column.size for column in columns]
    widths = [column.minimum(LONG_WORD if at else None) for at, column in enumerate(columns)]
    left = room - EDGES - GAP * (len(columns) - 1) - sum(widths)
    if left < 0:
        return None
    while growing := [at for at, size in enumerate(sizes) if widths[at] < size and left > 0]:
        share = max(left // len(growing), 1)
        for at in growing:
            more = min(share, sizes[at] - widths[at], left)
            widths[at], left = widths[at] + more, left - more
    return widths


def stacked(columns: Sequence[TableColumn], room: int, rule: str) -> str:
    """A table in which the first cell of each row has a line of its own, above the other cells. If these do not fit
    into one line, each of them has a line of its own too. `rule`: the character of the line below the headings."""
    first, others = columns[0], columns[1:]
    fits = sum(GAP + column.size for column in others) <= room
    fits = fits and not any("\n" in cell for column in others for cell in column.cells)
    if fits:
        heads, rows = _lines(others)
    else:
        heads, rows = [], _blocks(others, room, len(first.cells))
    length = max(map(cell_len, [first.head, *heads, *(line for lines in rows for line in lines)]))
    lines = [first.head, *heads, rule * min(length, room)]
    lines += [line for name, below in zip(first.cells, rows, strict=True) for line in (name, *below)]
    return "\n".join(["", *(line.rstrip() for line in lines), "", ""])


def _lines(columns: Sequence[TableColumn]) -> tuple[list[str], list[list[str]]]:
    """The lines of the headings, and one line for each row."""
    titles = [column.head.split("\n") for column in columns]
    height = max(map(len, titles))
    padded = [[""] * (height - len(title)) + title for title in titles]

    def line(cells: Sequence[str]) -> str:
        parts = []
        for column, cell in zip(columns, cells, strict=True):
            blanks = " " * (column.size - cell_len(cell))
            parts.append(f"{blanks}{cell}" if column.is_number else f"{cell}{blanks}")
        return "".join(" " * GAP + part for part in parts)

    rows = zip(*(column.cells for column in columns), strict=True)
    return [line(cells) for cells in zip(*padded, strict=True)], [[line(cells)] for cells in rows]


def _blocks(columns: Sequence[TableColumn], room: int, rows: int) -> list[list[str]]:
    """For each row, one line for each column: its heading and its cell."""
    heads = [" ".join(column.head.replace("-\n", "").split()) for column in columns]
    width = min(max(map(cell_len, heads)), room // 2)
    indent = " " * (2 * GAP + width)
    return [
        [
            line
            for head, column in zip(heads, columns, strict=True)
            if column.cells[row]
            for line in wrapped(f"  {head}{' ' * (width - cell_len(head))}  {column.cells[row]}", room, indent).split(
                "\n"
            )
        ]
        for row in range(rows)
    ]
