"""Detects rows that are equal or nearly equal to an earlier row.

Near duplicates are found by MinHash (Broder 1997) over pairs of words, with PERMUTATIONS hashes in BANDS bands. Rows
that share a band are compared by their complete signatures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Protocol

from tunekit.formats.labels import LabelValue

PERMUTATIONS, BANDS = 60, 12
NEAR = 0.85  # estimated Jaccard similarity of two rows' word pairs
FEWEST_WORDS = 8  # shorter rows are only compared for equality
UNSPACED = r"\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces, from Thai to Han
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
PLAIN_WORD = re.compile(r"\w+", re.ASCII)  # equals WORD for texts in ASCII, and takes a third of the time
UNSPOKEN = str.maketrans(dict.fromkeys(".,;:!?'\"…。、，！？", " "))  # ignored in comparisons; accents are not ignored
NEAR_DUPLICATES = "pip install 'tunekit[data]'"  # the command that installs the package for near duplicates
RowLabel = LabelValue | bool | None  # the label of a row; None: the row has no label


class WordPairs(Protocol):
    """The MinHash of a row's word pairs."""

    def jaccard(self, other: object) -> float:
        """The estimated Jaccard similarity of two rows' word pairs."""


@dataclass
class SimilarityIndex:
    """An index of rows, by their texts and by the bands of their signatures."""

    texts: dict[int, tuple[str, str, RowLabel]] = field(default_factory=dict)  # key of a row -> source, place and label
    bands: list[dict[int, int]] = field(default_factory=lambda: [{} for _ in range(BANDS)])
    signatures: list[tuple[WordPairs | None, str, str, RowLabel]] = field(default_factory=list)

    def like(self, row: RowSignature) -> tuple[str, str, str, RowLabel] | None:
        """A similar row of the index, as ("exact" or "near", source, place, label); None if no row is similar."""
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

    def add(self, row: RowSignature, name: str, place: str, label: RowLabel = None) -> None:
        """Add a row to the index. `name`: the name of its source. `place`: its line in it, as text."""
        self.texts[row.key] = name, place, label
        if row.bands:
            for band, part in zip(self.bands, row.bands, strict=True):
                band.setdefault(part, len(self.signatures))
            self.signatures.append((row.signature, name, place, label))


@dataclass(frozen=True)
class RowSignature:
    """The signature of a row. `key`: the hash of its normalised text. `signature`: the MinHash of its word
    pairs. `bands`: the hash of each band of the MinHash."""

    key: int
    signature: WordPairs | None = None
    bands: Sequence[int] = ()


@cache
def finds_near_duplicates() -> bool:
    """Whether the package that computes MinHashes is installed. Without it, only equal texts are found."""
    return find_spec("rensa") is not None


def signed(text: str, beside: str = "") -> RowSignature:
    """The signature of a text. Case, spaces and punctuation are ignored; a short text has no near duplicates.

    `beside`: a second text of the row. Only rows with the same second text can be near duplicates.
    """
    lower, key = text.lower(), hash(_plain(text))
    words = (PLAIN_WORD if lower.isascii() else WORD).findall(lower)
    if len(words) < FEWEST_WORDS or not finds_near_duplicates():
        return RowSignature(key)
    from rensa import RMinHash

    signature = RMinHash(num_perm=PERMUTATIONS, seed=0)
    signature.update([f"{beside}{a} {b}" for a, b in pairwise(words)])
    digest, width = tuple(signature.digest()), PERMUTATIONS // BANDS
    return RowSignature(key, signature, [hash(digest[at : at + width]) for at in range(0, PERMUTATIONS, width)])


def signed_pair(first: str, second: str) -> RowSignature:
    """The signature of a pair of texts. Two pairs are equal if their texts are equal, in the same order.

    Two pairs are nearly equal if their longer texts are equal and their shorter texts nearly equal, in any order. Equal
    longer texts alone are not enough: a premise, for example, is often part of many pairs.
    """
    shorter, longer = sorted((first, second), key=len)
    return replace(signed(shorter, f"{_plain(longer)}\n"), key=hash((_plain(first), _plain(second))))


def _plain(text: str) -> str:
    """The text in lower case, without punctuation, with single spaces."""
    return " ".join(text.lower().translate(UNSPOKEN).split()) or text.strip()
