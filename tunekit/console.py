"""All that a person sees: lines, tables, panels, coloured tokens, and one live line while training.

Comes in: plain text and records; nothing in them is ever read as markup or as a terminal command.  Goes out: standard
output (warnings and errors: standard error).  Next: the verbs.  rich is imported only where a table or colours need it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from tunekit.decisions import EvaluationRecord, StepRecord, bytes_text

PIPE_COLUMNS = 120  # where output is not a terminal and COLUMNS is not set
LIVE_SECONDS = 0.1  # between two drawings of the live line
PLAIN_SECONDS = 10.0  # between two plain lines, at least
PLAIN_SHARE = 0.02  # and at least this share of the time passed, so that a long run stays readable
RATE_STEPS = 30  # steps whose pace gives the time left
CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}
COLOURS = {"warning": "33", "error": "31"}


def visible(text: str) -> str:
    """`text` with control characters spelled out, so that data cannot command the terminal."""
    return text.translate(CONTROL)


class Console:
    """Where a verb prints. With enabled=False (every rank but the first) it prints nothing at all."""

    def __init__(self, *, enabled: bool = True, output: TextIO | None = None, errors: TextIO | None = None) -> None:
        self.enabled = enabled
        self._output = output
        self._errors = errors
        self._live: LiveLine | None = None
        self._gone: set[int] = set()  # file descriptors that nobody reads any more

    # Streams are looked up at each use, so that a test or a caller may replace them.
    @property
    def output(self) -> TextIO:
        """Standard output, or what was given instead."""
        return self._output or sys.stdout or Nowhere()

    @property
    def errors(self) -> TextIO:
        """Standard error, or what was given instead."""
        return self._errors or sys.stderr or Nowhere()

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
        """A line of output."""
        self.write(visible(text) + "\n")

    def warn(self, text: str) -> None:
        """A line on standard error that begins with `warning: `."""
        self._complain("warning", text)

    def error(self, text: str) -> None:
        """A line on standard error that begins with `error: `."""
        self._complain("error", text)

    def _complain(self, word: str, text: str) -> None:
        colours = is_terminal(self.errors) and self._may_colour()
        label = f"\x1b[{COLOURS[word]}m{word}:\x1b[0m" if colours else f"{word}:"
        self.write(f"{label} {visible(text)}\n", self.errors)

    def _may_colour(self) -> bool:
        return not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb", "unknown")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
        """A table; numbers are set to the right, None is left empty."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = [list(row) for row in rows]
        heading = Text(visible(title), style="bold") if title else None
        table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            cells = [row[index] for row in rows if row[index] is not None]
            numbers = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
            table.add_column(Text(visible(column)), justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell_text(cell))) for cell in row))
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

    def progress(self, total_steps: int, *, first_step: int = 0) -> Progress:
        """What to tell of each step of a run that starts after `first_step`: a context with `update(record)`."""
        return Progress(self, total_steps, first_step)

    def _print_rich(self, thing: Any) -> None:
        """Lay out with rich into text, then write it as all else is written."""
        if not self.enabled:
            return
        from rich.console import Console as RichConsole

        paper = Paper(self.output.encoding or "utf-8")
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
            if self._live is not None:
                self._live.clear()
            stream.write(encodable(stream, text))
            stream.flush()
        except (OSError, ValueError):
            self._gone.add(id(stream))
            redirect_to_nothing(stream)


class Paper(io.StringIO):
    """Where rich lays out text; it has the encoding of the stream that the text is for."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Rich draws frames in ASCII where this cannot do better."""
        return self._encoding


class Nowhere(io.StringIO):
    """Instead of a standard stream that was closed before Python began."""

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal; a closed one is not."""
    try:
        return stream.isatty()
    except (OSError, ValueError):
        return False


def can_encode(stream: TextIO, text: str) -> bool:
    """Whether a stream's encoding has all letters of `text`."""
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def encodable(stream: TextIO, text: str) -> str:
    """`text` with letters that the stream's encoding lacks spelled out."""
    if can_encode(stream, text):
        return text
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def redirect_to_nothing(stream: TextIO) -> None:
    """Point a dead stream's file descriptor at nothing, so that Python's last flush does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, stream.fileno())
        os.close(number)


def cell_text(value: object) -> str:
    """A value in a table: whole numbers grouped by thousands, fractions to four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def join_segments(segments: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours of one kind put together."""
    joined: list[tuple[str, bool]] = []
    for piece, trained in segments:
        if joined and joined[-1][1] == trained:
            joined[-1] = (joined[-1][0] + piece, trained)
        else:
            joined.append((piece, trained))
    return joined


def time_text(seconds: float) -> str:
    """A duration as a person reads it: 75 -> "1m15s"."""
    whole = max(round(seconds), 0)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class LiveLine:
    """One line at the bottom of a terminal, drawn over again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = False

    def draw(self, text: str) -> None:
        """Show `text`, cut to the terminal's width."""
        line = text[: self._console.columns - 1]
        self._shown = False  # the new line covers the old one; no need to clear it first
        self._console.write(f"\r{line}\x1b[K")
        self._shown = True

    def clear(self) -> None:
        """Take the line away before something else is printed."""
        if self._shown:
            self._shown = False
            self._console.write("\r\x1b[K")


class Progress:
    """Tells of steps and evaluations: a live line on a terminal, else plain lines, the first and the last always."""

    def __init__(
        self, console: Console, total_steps: int, first_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._total = total_steps
        self._clock = clock
        self._began = clock()
        self._told = float("-inf")
        self._last: StepRecord | None = None
        self._told_record: StepRecord | None = None
        self._pace: deque[tuple[int, float]] = deque([(first_step, self._began)], maxlen=RATE_STEPS + 1)
        self._live = LiveLine(console) if console.is_terminal else None

    def __enter__(self) -> Progress:
        self._console._live = self._live
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None and self._live is not None:
            self._live.draw(self.line(self._last))
            self._console._live = None
            self._console.write("\n")
        elif self._last is not None and self._last is not self._told_record:
            self._console.info(self.line(self._last))
        self._console._live = None

    def update(self, record: StepRecord) -> None:
        """One optimizer step is done."""
        now = self._clock()
        self._last = record
        self._pace.append((record.step, now))
        last = record.step >= self._total
        wait = LIVE_SECONDS if self._live is not None else max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._began))
        if not last and now - self._told < wait:
            return
        self._told, self._told_record = now, record
        if self._live is not None:
            self._live.draw(self.line(record))
        else:
            self._console.info(self.line(record))

    def evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation is done; it stays on the screen."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in sorted(record.metrics.items()))
        self._console.info(f"step {record.step}  eval  {values}")

    def line(self, record: StepRecord) -> str:
        """step 12/100  loss 1.2345  lr 2.00e-04  1,234 tok/s  1.5 GiB  3m20s left."""
        parts = [
            f"step {record.step}/{self._total}",
            f"loss {record.loss:.4f}",
            f"lr {record.learning_rate:.2e}",
            f"{record.tokens_per_second:,.0f} tok/s",
            bytes_text(record.peak_bytes),
        ]
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{time_text(left)} left")
        return "  ".join(parts)

    def seconds_left(self) -> float | None:
        """The pace of the last steps, carried on to the end; None before the first step and after the last."""
        (first, began), (last, now) = self._pace[0], self._pace[-1]
        if last <= first or last >= self._total:
            return None
        return (self._total - last) * (now - began) / (last - first)
