"""Standard streams that may be closed, no terminal, or unable to encode a text.

Comes in: a stream.  Goes out: what it can do.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import TextIO


class EncodedBuffer(io.StringIO):
    """Where rich lays out text; it has the encoding of the stream that the text is for."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Rich draws frames in ASCII where this cannot do better."""
        return self._encoding


class NullStream(io.StringIO):
    """Takes the place of a standard stream that was closed before Python began."""

    def write(self, text: str) -> int:
        """Discard the text."""
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
