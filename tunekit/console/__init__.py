"""All output for users: lines, tables, panels, coloured tokens, and one live line during training.

Text is never interpreted as markup or as a terminal command. rich is imported only when a table or colours need it.
"""

import io
import json
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TextIO
from weakref import WeakSet

from tunekit.console.loudness import is_quiet, is_verbose
from tunekit.console.streams import can_draw, can_encode, columns_of, encodable, redirect_to_nothing
from tunekit.console.text import cell_text, json_line, visible, wrapped
from tunekit.errors import redact

__all__ = ["Console", "visible"]

PIPE_COLUMNS = 120  # if output is not a terminal and COLUMNS is not set
_LIVE: WeakSet[TextIO] = WeakSet()  # terminals whose last line is a live line, of any console
FRAME = 6  # characters of a panel's frame, and between its names and values


class Console:
    """The output of a command for the user. `enabled`: False on all ranks except the first, which then print nothing.
    If `json_file` is "-", everything is printed to standard error, because standard output must contain only JSON."""

    def __init__(
        self,
        *,
        enabled: bool = True,
        json_file: str | None = None,
        output: TextIO | None = None,
        errors: TextIO | None = None,
    ) -> None:
        self.enabled = enabled
        self._json_on_output = json_file == "-"
        self._output = output
        self._errors = errors
        self._writing = threading.RLock()  # the heartbeat of the first step writes from its own thread
        self._closed: set[int] = set()  # ids of closed streams

    # Streams are looked up at each use, so that tests and callers may replace them.
    @property
    def output(self) -> TextIO:
        """Standard output, or its replacement."""
        return self.errors if self._json_on_output else self._output or sys.stdout or io.StringIO()

    @property
    def errors(self) -> TextIO:
        """Standard error, or its replacement."""
        return self._errors or sys.stderr or io.StringIO()

    @property
    def is_terminal(self) -> bool:
        """Whether standard output is a terminal that can redraw a live line."""
        return can_draw(self.output)

    @property
    def has_colours(self) -> bool:
        """Whether standard output shows colours: it is a terminal and NO_COLOR is not set."""
        return self.is_terminal and not os.environ.get("NO_COLOR")

    @property
    def columns(self) -> int:
        """The width for layouts: the width of the terminal. If the output is not a terminal: COLUMNS, or 120."""
        if terminal := columns_of(self.output):
            return terminal
        setting = os.environ.get("COLUMNS", "")
        return max(int(setting), 10) if setting.isdecimal() else PIPE_COLUMNS

    def info(self, *lines: str) -> None:
        """Print notes. On a terminal, they are wrapped between words."""
        if not is_quiet():
            self.result(*lines)

    def result(self, *lines: str) -> None:
        """Print lines of a command's result, also with --quiet."""
        self.write("".join(f"{_fitted(self.output, visible(line))}\n" for line in lines))

    def listing(self, title: str, pairs: Iterable[tuple[str, str]], width: int) -> None:
        """Print a title, and below it names with descriptions. `width`: the characters of the longest name."""
        lines = (f"  {name:<{width}}  {description}".rstrip() for name, description in pairs)
        indented = (_fitted(self.output, visible(line), " " * (width + 4)) for line in lines)
        self.write("".join(f"{line}\n" for line in (visible(title), *indented)))

    def detail(self, *lines: str) -> None:
        """Print notes, but only with --verbose."""
        if is_verbose():
            self.info(*lines)

    def next_steps(self, lines: Iterable[str]) -> None:
        """Print what to do next."""
        self.info(*(f"next: {line}" for line in lines))

    def json(self, value: object) -> None:
        """Print a value as one line of JSON. Characters that the stream cannot encode are escaped."""
        text = json_line(value)
        self.write(f"{text if can_encode(self.output, text) else json.dumps(value)}\n")

    def warn(self, *lines: str) -> None:
        """Print lines on standard error, prefixed with `warning: `."""
        colours = can_draw(self.errors) and not os.environ.get("NO_COLOR")
        for line in lines:
            text = _fitted(self.errors, f"warning: {visible(redact(line))}")  # colours would count as characters
            text = text.replace("warning:", "\x1b[33mwarning:\x1b[0m", 1) if colours else text
            self.write(f"{text}\n", self.errors)

    def error(self, text: str) -> None:
        """Print the lines of an error on standard error."""
        self.write(f"{_fitted(self.errors, visible(redact(text)))}\n", self.errors)

    def confirm(self, question: str) -> bool:
        """Ask the user a question, and return whether the answer is yes. False if standard input is not a terminal."""
        if sys.stdin is None or not sys.stdin.isatty():
            return False
        self.output.write(f"{visible(question)} [y/N] ")
        self.output.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
        """Print a table. Numbers are right-aligned, None is an empty cell. A column's name may have several lines.
        If the table is too wide, long texts are wrapped; if even their words do not fit, the cells of a row are printed
        below its first cell."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        from tunekit.console.tables import EDGES, TableColumn, column_widths, stacked

        values = list(zip(*rows, strict=True)) or [() for _ in columns]
        heads = ["\n".join(map(visible, column.split("\n"))) for column in columns]
        laid = [
            TableColumn(head, [visible(cell_text(cell)) for cell in cells], _has_numbers(cells))
            for head, cells in zip(heads, values, strict=True)
        ]
        if title:
            self.info(title)
        widths = column_widths(laid, self.columns)
        if widths is None and len(laid) > 1:
            self.write(stacked(laid, self.columns, "─" if can_encode(self.output, "─") else "-"))
            return
        tight = sum(widths or []) + 3 * (len(laid) - 1) + EDGES > self.columns
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=tight)
        for at, column in enumerate(laid):
            justify: Literal["left", "right"] = "right" if column.is_number else "left"
            table.add_column(
                Text(column.head), justify=justify, overflow="fold", width=None if widths is None else widths[at]
            )
        for cells in zip(*(column.cells for column in laid), strict=True):
            table.add_row(*map(Text, cells))
        self._print_rich(table)

    def panel(self, title: str, pairs: Mapping[str, object] | Iterable[tuple[str, object]]) -> None:
        """Print names and values in a frame; without a frame if it would break a word. Pairs with the value None are
        left out."""
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        rows = [(visible(name), visible(cell_text(value))) for name, value in dict(pairs).items() if value is not None]
        width = max((len(name) for name, _ in rows), default=0)
        longest = max((len(word) for _, value in rows for word in value.split()), default=0)
        if width + longest + FRAME > self.columns:
            self.listing(title, rows, width)
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", overflow="fold")
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(name), Text(value))
        self._print_rich(Panel(grid, title=Text(visible(title)), title_align="left", expand=False))

    def print_segments(self, segments: Iterable[tuple[str, bool]]) -> None:
        """Print pieces of text, each with a flag: whether the model is trained on it. Trained pieces are green; without
        colours, they are between ⟦ and ⟧ (or [[ and ]])."""
        from rich.text import Text

        text, colours = Text(), self.has_colours
        opening, closing = ("⟦", "⟧") if can_encode(self.output, "⟦⟧") else ("[[", "]]")
        for piece, trained in segments:
            if colours:
                text.append(visible(piece), style="bold green" if trained else "dim")
            else:
                text.append(f"{opening}{visible(piece)}{closing}" if trained else visible(piece))
        self._print_rich(text)

    def draw(self, text: str, *, stays: bool = False) -> None:
        """Draw a live line at the bottom of a terminal; it replaces the previous live line and is cut to the terminal's
        width. Later output replaces it, unless `stays`. If the output is not a terminal, print a normal line."""
        if not self.is_terminal:
            self.info(text)
        elif not is_quiet():
            with self._writing:
                _LIVE.discard(self.output)  # the new line covers the old one; no need to clear it first
                self.write(f"\r{text[: self.columns - 1]}\x1b[K" + ("\n" if stays else ""))
                if not stays:
                    _LIVE.add(self.output)

    def named(self, name: str) -> "Console":
        """A console for one of several runs: each line starts with the run's name."""
        return _NamedConsole(self, name)

    def _print_rich(self, thing: object) -> None:
        """Render an object of rich as text, and print this text in the same way as other text."""
        if not self.enabled:
            return
        from rich.console import Console as RichConsole

        paper = io.TextIOWrapper(io.BytesIO(), self.output.encoding or "utf-8", "backslashreplace", newline="")
        rich_console = RichConsole(
            file=paper,
            force_terminal=self.is_terminal,
            color_system="auto" if self.has_colours else None,
            width=self.columns,
            legacy_windows=False,
        )
        rich_console.print(thing, markup=False, highlight=False, emoji=False)
        paper.seek(0)
        self.write("\n".join(line.rstrip(" ") for line in paper.read().split("\n")))

    def write(self, text: str, stream: TextIO | None = None) -> None:
        """Write text unchanged. If nobody reads the stream any more (a closed pipe, a closed terminal), this is not an
        error."""
        stream = stream or self.output
        if not self.enabled or not text or id(stream) in self._closed:
            return
        try:
            with self._writing:
                if self.output in _LIVE:
                    _LIVE.discard(self.output)
                    self.write("\r\x1b[K")
                stream.write(encodable(stream, text))
                stream.flush()
        except (OSError, ValueError):
            self._closed.add(id(stream))
            redirect_to_nothing(stream)


def _has_numbers(cells: Iterable[object]) -> bool:
    """Whether a column has numbers only, apart from empty cells."""
    values = [cell for cell in cells if cell is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)


def _fitted(stream: TextIO, text: str, indent: str = "  ") -> str:
    """The text, wrapped to the width of a terminal. Unchanged if the stream is not a terminal."""
    columns = columns_of(stream)
    return text if columns is None else wrapped(text, columns, indent)


class _NamedConsole(Console):
    """A console whose lines start with a name."""

    def __init__(self, console: Console, name: str) -> None:
        super().__init__(enabled=console.enabled)
        self._console, self._name = console, name

    @property
    def output(self) -> TextIO:
        return self._console.output

    @property
    def columns(self) -> int:
        return max(self._console.columns - len(f"{self._name}: "), 10)

    def info(self, *lines: str) -> None:
        self._console.info(*(f"{self._name}: {line}" for line in lines))

    def warn(self, *lines: str) -> None:
        self._console.warn(*(f"{self._name}: {line}" for line in lines))

    def draw(self, text: str, *, stays: bool = False) -> None:
        self._console.draw(f"{self._name}: {text}", stays=stays)

    def write(self, text: str, stream: TextIO | None = None) -> None:
        self._console.write(text, stream)
