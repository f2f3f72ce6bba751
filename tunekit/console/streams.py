"""Standard streams that may be closed, no terminal, or unable to encode a text."""

import contextlib
import os
from typing import TextIO


def can_draw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can move back in its line; a closed one is not."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
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
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def redirect_to_nothing(stream: TextIO) -> None:
    """Point a dead stream's file descriptor at nothing, so that Python's last flush does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, stream.fileno())
        os.close(number)
