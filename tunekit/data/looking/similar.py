"""Rows that repeat or nearly repeat an earlier one.

Near duplicates are found by MinHash (Broder 1997) over pairs of words: PERMUTATIONS hashes in BANDS bands; rows that
share a band are compared by their whole signatures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

PERMUTATIONS, BANDS = 60, 12
NEAR = 0.85  # estimated Jaccard similarity of two rows' word pairs
FEWEST_WORDS = 8  # of a row whose nearness says something
UNSPACED = r"\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai to Han: writings without spaces
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
PLAIN_WORD = re.compile(r"\w+", re.ASCII)  # the same of a text in ASCII, in a third of the time
UNSPOKEN = str.maketrans(dict.fromkeys(".,;:!?'\"…。、，！？", " "))  # the rest of equal texts is equal: accents too
RowLabel = str | bool | None  # of a whole row, where it has one


class WordPairs(Protocol):
    """The MinHash of a row's word pairs."""

    def jaccard(self, other: object) -> float:
        """The estimated share of what both have."""


@dataclass
class SimilarityIndex:
    """Rows by their text and by the bands of their signature."""

    texts: dict[int, tuple[str, int, RowLabel]] = field(default_factory=dict)  # key of a row -> file, line and label
    bands: list[dict[int, int]] = field(default_factory=lambda: [{} for _ in range(BANDS)])
    signatures: list[tuple[WordPairs | None, str, int, RowLabel]] = field(default_factory=list)

    def like(self, row: RowSignature) -> tuple[str, str, int, RowLabel] | None:
        """("exact" or "near", file, line, label) of a row like this one; None where there is none."""
        if row.key in self.texts:
            return "exact", *self.texts[row.key]
        tried: set[int] = set()
        for band, part in zip(self.bands, row.bands, strict=False):
            other = band.get(part)
            if other is not None and other not in tried:
                tried.add(other)
                if row.signature is not None and row.signature.jaccard(self.signatures[other][0]) >= NEAR:
                    return "near", *self.signatures[other][1:]
        return None

    def add(self, row: RowSignature, name: str, line: int, label: RowLabel = None) -> None:
        """Remember a row."""
        self.texts[row.key] = name, line, label
        if row.bands:
            for band, part in zip(self.bands, row.bands, strict=True):
                band.setdefault(part, len(self.signatures))
            self.signatures.append((row.signature, name, line, label))


@dataclass(frozen=True)
class RowSignature:
    """A row as it is compared: the hash of what it says, the signature of its word pairs, and the hash of each band."""

    key: int
    signature: WordPairs | None = None
    bands: Sequence[int] = ()


def signed(text: str, beside: str = "") -> RowSignature:
    """Of a short text only what repeats it counts: all but case, spaces and the marks of sentences. `beside`: what a
    row that is nearly equal must have too."""
    from rensa import RMinHash

    lower, key = text.lower(), hash(_plain(text))
    words = (PLAIN_WORD if lower.isascii() else WORD).findall(lower)
    if len(words) < FEWEST_WORDS:
        return RowSignature(key)
    signature = RMinHash(num_perm=PERMUTATIONS, seed=0)
    signature.update([f"{beside}{a} {b}" for a, b in pairwise(words)])
    digest, width = tuple(signature.digest()), PERMUTATIONS // BANDS
    return RowSignature(key, signature, [hash(digest[at : at + width]) for at in range(0, PERMUTATIONS, width)])


def signed_pair(first: str, second: str) -> RowSignature:
    """Two texts: a pair repeats one with equal texts, in their order. It is near one with an equal longer text and a
    nearly equal shorter one, in any order: many pairs share one long text, such as the premise."""
    shorter, longer = sorted((first, second), key=len)
    return replace(signed(shorter, f"{_plain(longer)}\n"), key=hash((_plain(first), _plain(second))))


def _plain(text: str) -> str:
    """A text without case, marks of sentences and double spaces."""
    return " ".join(text.lower().translate(UNSPOKEN).split()) or text.strip()
