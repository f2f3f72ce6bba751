"""What error rates of transcripts share: which pairs they count."""

from __future__ import annotations

from collections.abc import Sequence


def with_words(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs whose reference has words: of others no share of errors can be told. Raises: ValueError without one."""
    kept = [pair for pair in zip(predictions, references, strict=True) if pair[1].strip()]
    if not kept:
        raise ValueError("no reference has a word")
    return kept
