"""Functions for standard streams that may be closed, redirected, or unable to encode a text."""

import contextlib
import os
import shutil
from typing import TextIO


def can_draw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can redraw its line; False for a closed stream."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except (OSError, ValueError):
        return False


def columns_of(stream: TextIO) -> int | None:
    """The width of a terminal; None if the stream is not a terminal."""
    return max(shutil.get_terminal_size().columns, 10) if can_draw(stream) else None


def can_encode(stream: TextIO, text: str) -> bool:
    """Whether a stream can encode all characters of `text`."""
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def encodable(stream: TextIO, text: str) -> str:
    """The text, with characters that the stream cannot encode written as escapes."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def redirect_to_nothing(stream: TextIO) -> None:
    """Redirect a dead stream's file descriptor to the null device, so that Python's last flush does not fail."""
    with contextlib.suppress(OSError, ValueError):
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, stream.fileno())
        os.close(number)
