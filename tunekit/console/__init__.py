"""All that a person sees: lines, tables, panels, coloured tokens, and one live line while training.

Comes in: plain text and records; nothing in them is ever read as markup or as a terminal command.  Goes out: standard
output (warnings and errors: standard error).  rich is imported only where a table or colours need it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from tunekit.console.streams import EncodedBuffer, NullStream, can_encode, encodable, is_terminal, redirect_to_nothing
from tunekit.console.text import cell_text, join_segments, visible
from tunekit.errors import redact

__all__ = ["Console", "visible"]

PIPE_COLUMNS = 120  # where output is not a terminal and COLUMNS is not set
COLOURS = {"warning": "33", "error": "31"}


class Console:
    """Where a verb prints. With enabled=False (every rank but the first) it prints nothing at all; with `json_file` -
    everything goes to standard error, since standard output then holds JSON and nothing else."""

    def __init__(
        self,
        *,
        enabled: bool = True,
        json_file: str | None = None,
        output: TextIO | None = None,
        errors: TextIO | None = None,
    ) -> None:
        self.enabled = enabled
        self._beside_json = json_file == "-"
        self._output = output
        self._errors = errors
        self._drawn = False  # whether a live line stands at the bottom of the terminal
        self._gone: set[int] = set()  # file descriptors that nobody reads any more

    # Streams are looked up at each use, so that a test or a caller may replace them.
    @property
    def output(self) -> TextIO:
        """Standard output, or what was given instead."""
        return self.errors if self._beside_json else self._output or sys.stdout or NullStream()

    @property
    def errors(self) -> TextIO:
        """Standard error, or what was given instead."""
        return self._errors or sys.stderr or NullStream()

    @property
    def is_terminal(self) -> bool:
        """Whether standard output can draw a live line."""
        return is_terminal(self.output) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")

    @property
    def has_colours(self) -> bool:
        """Whether standard output shows colours: a terminal, unless NO_COLOR is set to anything."""
        return self.is_terminal and not os.environ.get("NO_COLOR")

    @property
    def columns(self) -> int:
        """Width to lay out for: COLUMNS, the terminal's, or 120 in a pipe."""
        fallback = (80, 24) if self.is_terminal else (PIPE_COLUMNS, 24)
        with contextlib.suppress(ValueError):
            if not self.is_terminal:
                return max(int(os.environ.get("COLUMNS") or PIPE_COLUMNS), 10)
        return max(shutil.get_terminal_size(fallback).columns, 10)

    def info(self, text: str = "") -> None:
        """A line of output; on a terminal that is narrower, several, broken between words."""
        self.write(self._wrapped(visible(text)) + "\n")

    def warn(self, text: str) -> None:
        """A line on standard error that begins with `warning: `."""
        self._complain("warning", text)

    def error(self, text: str) -> None:
        """A line on standard error that begins with `error: `."""
        self._complain("error", text)

    def _complain(self, word: str, text: str) -> None:
        colours = is_terminal(self.errors) and self._may_colour()
        label = f"\x1b[{COLOURS[word]}m{word}:\x1b[0m" if colours else f"{word}:"
        self.write(self._wrapped(f"{label} {visible(redact(text))}") + "\n", self.errors)

    def _wrapped(self, text: str) -> str:
        if not self.is_terminal:
            return text
        lines = [
            textwrap.fill(line, self.columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            if len(line) > self.columns
            else line
            for line in text.split("\n")
        ]
        return "\n".join(lines)

    def _may_colour(self) -> bool:
        return not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb", "unknown")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
        """A table; numbers are set to the right, None is left empty."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = [list(row) for row in rows]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            cells = [row[index] for row in rows if row[index] is not None]
            numbers = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
            table.add_column(Text(visible(column)), justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell_text(cell))) for cell in row))
        if title:
            self.info(title)
        self._print_rich(table)

    def panel(self, title: str, pairs: Mapping[str, object] | Iterable[tuple[str, object]]) -> None:
        """Names and values in a frame; pairs whose value is None are left out."""
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", overflow="fold")
        grid.add_column(overflow="fold")
        for name, value in pairs.items() if isinstance(pairs, Mapping) else pairs:
            if value is not None:
                grid.add_row(Text(visible(name)), Text(visible(cell_text(value))))
        self._print_rich(Panel(grid, title=Text(visible(title)), title_align="left", expand=False))

    def print_segments(self, segments: Iterable[tuple[str, bool]]) -> None:
        """Text in pieces, those trained on in green; without colours, between ⟦ and ⟧ (or [[ and ]])."""
        from rich.text import Text

        text, colours = Text(), self.has_colours
        opening, closing = ("⟦", "⟧") if can_encode(self.output, "⟦⟧") else ("[[", "]]")
        for piece, trained in join_segments(segments):
            if colours:
                text.append(visible(piece), style="bold green" if trained else "dim")
            else:
                text.append(f"{opening}{visible(piece)}{closing}" if trained else visible(piece))
        self._print_rich(text)

    def draw(self, text: str) -> None:
        """One live line at the bottom of a terminal, cut to its width, over the one before; other output covers it."""
        self._drawn = False  # the new line covers the old one; no need to clear it first
        self.write(f"\r{text[: self.columns - 1]}\x1b[K")
        self._drawn = True

    def keep_drawn(self) -> None:
        """End the live line, which stays."""
        self._drawn = False
        self.write("\n")

    def _print_rich(self, thing: object) -> None:
        """Lay out with rich into text, then write it as all else is written."""
        if not self.enabled:
            return
        from rich.console import Console as RichConsole

        paper = EncodedBuffer(self.output.encoding or "utf-8")
        rich_console = RichConsole(
            file=paper,
            force_terminal=self.is_terminal,
            no_color=not self.has_colours,
            color_system="auto" if self.has_colours else None,
            width=self.columns,
            legacy_windows=False,
            safe_box=True,
        )
        rich_console.print(thing, markup=False, highlight=False, emoji=False)
        self.write("\n".join(line.rstrip(" ") for line in paper.getvalue().split("\n")))

    def write(self, text: str, stream: TextIO | None = None) -> None:
        """Write text as it is. A reader that has gone (a closed pipe, a hung-up terminal) never stops a run."""
        stream = stream or self.output
        if not self.enabled or id(stream) in self._gone:
            return
        try:
            if self._drawn:
                self._drawn = False
                self.write("\r\x1b[K")
            stream.write(encodable(stream, text))
            stream.flush()
        except (OSError, ValueError):
            self._gone.add(id(stream))
            redirect_to_nothing(stream)
