"""The bytes of single tokens. A token can be only a part of a character; then it has bytes but no text."""

from __future__ import annotations

import re
from functools import cache

from tunekit.model.text.tokenizer import LoadedTokenizer

SPACE = "\u2581"  # SentencePiece's letter for a space
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: LoadedTokenizer, token_id: int) -> bytes:
    """The bytes that a token adds to a text. For a special token, these are the bytes of its name."""
    spelled: str | None = tokenizer.backend.id_to_token(token_id)
    if spelled is not None and (byte := BYTE_TOKEN.fullmatch(spelled)):
        return bytes([int(byte[1], 16)])
    if spelled is not None and "\ufffd" in tokenizer.decode([token_id]):
        letters = [_byte_letters().get(letter) for letter in spelled]
        if all(byte is not None for byte in letters):
            return bytes(byte for byte in letters if byte is not None)
    text = tokenizer.token_text(token_id)
    if spelled is not None and (spaces := len(spelled) - len(spelled.lstrip(SPACE))):
        text = " " * spaces + text.lstrip(f" {SPACE}")
    return text.encode("utf-8", "surrogatepass")


@cache
def _byte_letters() -> dict[str, int]:
    """A mapping from the letters with which byte-level tokenizers write bytes to these bytes.

    Source: GPT-2's encoder.py, bytes_to_unicode.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + at): byte for at, byte in enumerate(others)}
