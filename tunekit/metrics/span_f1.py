"""F1 of spans: a span is right if its kind, its first and its last word are right."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunekit.metrics.classes import f1

DESCRIPTION = "F1 of tagged spans (B-X, I-X); a span is right if its kind, first word and last word are right"
NEEDS = ("spans",)
HIGHER_IS_BETTER = True

TaggedSpan = tuple[str, int, int]
OUTSIDE = ("O", "")


def from_sums(sums: Mapping[str, Any]) -> float:
    """2 right / (predicted + true) over the spans of all kinds, as in seqeval's f1_score. If there are no spans, the
    result is 0.
    `spans`: for each kind, the number of spans predicted right, predicted, and true."""
    right, predicted, there = map(sum, zip(*sums["spans"], strict=True)) if sums["spans"] else (0, 0, 0)
    return f1(right, predicted, there)


def kinds_of(tags: Sequence[str]) -> list[str]:
    """The sorted kinds of spans that occur in the tags, such as PER for B-PER."""
    return sorted({kind for tag in tags if (kind := _parts(tag)[1])})


def find_spans(tags: Sequence[str]) -> Iterator[TaggedSpan]:
    """The spans in a row's tags, each as (kind, first word, last word), as in seqeval's get_entities in its default
    mode.

    A span ends before O, before B- or S-, before a tag of a different kind, and after E- or S-. A tag I- or E- with no
    span before it starts a span.
    """
    first, before = 0, OUTSIDE
    for place, (letter, kind) in enumerate([*map(_parts, tags), OUTSIDE]):
        continues = before[0] in "BI" and letter in "IE" and kind == before[1]
        if before != OUTSIDE and not continues:
            yield before[1], first, place - 1
        first, before = first if continues else place, (letter, kind)


def _parts(tag: str) -> tuple[str, str]:
    """The prefix and the kind of a tag: B-PER -> (B, PER), B -> (B, _). Any other text gives OUTSIDE."""
    letter, dash, kind = tag[:1], tag[1:2], tag[2:]
    return (letter, kind or "_") if letter in ("B", "I", "E", "S") and dash in ("", "-") else OUTSIDE
