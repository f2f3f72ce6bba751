"""`format: embedding`: texts for embedding models: `{"anchor": ..., "positive": ..., "negative": ...}`, or two texts
and their similarity: `{"sentence1": ..., "sentence2": ..., "score": ...}`.

The names of columns decide their roles, never their order. `negatives` is a list; `negative_1`, `negative_2` ... are
read in the order of their numbers.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tunekit.errors import DataError
from tunekit.formats import label_pairs
from tunekit.formats.fields import Fields, check_text, read_text

ANCHORS = ("query", "question", "sentence1", "premise", "text1", "sentence_a", "sentence_A")
POSITIVES = ("document", "answer", "passage", "context", "response", "sentence2", "hypothesis", "text2", "sentence_b")
SCORES = ("scores", "label", "labels", "similarity", "similarity_score", "relatedness_score")
ALIASES = dict.fromkeys(ANCHORS, "anchor") | dict.fromkeys((*POSITIVES, "sentence_B"), "positive")
ALIASES |= dict(zip(label_pairs.NAMES[1], ("anchor", "positive"), strict=True)) | dict.fromkeys(SCORES, "score")
SEARCHES = (("anchor", "query"), ("positive", "document", "passage", "context"))  # names that only searches have
SIMILARITIES = ("similarity", "similarity_score", "relatedness_score")
NUMBERED = re.compile(r"(?:hard_)?negative(?:_?([0-9]{1,4}))?")
DESCRIPTION = (
    "anchor (or query, question, sentence1, premise, text1, sentence_a) and positive (or document, answer, passage, "
    "context, response, sentence2, hypothesis, text2, sentence_b): two texts; negative, negative_1 ... or negatives: "
    "texts, or a list; score (or scores, label, similarity): a number, or a list of a teacher's scores"
)
FIELDS = ("anchor", "positive", "negatives", "negative", *(f"negative_{number}" for number in range(100)), "score")
REQUIRED = ("anchor", "positive")
EXAMPLE = "embedding"


@dataclass(frozen=True)
class EmbeddingExample:
    """The texts of a row: the anchor, its positive (or the other text of a pair), and any negatives. `scores`: the
    similarity or label of a pair, or a teacher's scores of the documents; empty if the row has none."""

    texts: tuple[str, ...]
    scores: tuple[float, ...] = ()


def make_example(row: Fields) -> EmbeddingExample:
    """The texts and the scores of a row. Raises: DataError if two columns could have one role, or for wrong values."""
    anchor, positive = (read_text(row, _column(row, field)) for field in REQUIRED)
    return EmbeddingExample((anchor, positive, *_negatives(row)), _scores(row))


def is_search(row: Fields) -> bool:
    """Whether the columns are those of a search or of similar texts, and have no other usual meaning."""
    searched = all(any(name in row for name in names) for names in SEARCHES)
    return searched or (label_pairs.names_pair(row) and any(name in row for name in SIMILARITIES))


def _column(row: Fields, field: str) -> str:
    """The name of the column with this role."""
    if field in row:
        return field
    named = [name for name in row if ALIASES.get(name) == field]
    if len(named) > 1:
        what = f"the columns '{named[0]}' and '{named[1]}' could both be the {field}"
        raise DataError(what, f"map the right column under data.train[].columns, for example {{{named[0]}: {field}}}")
    return named[0] if named else field


def _negatives(row: Fields) -> list[str]:
    """All negatives: of the list, then of single columns by number."""
    listed = row.get("negatives")
    if listed is not None and (isinstance(listed, str | Mapping) or not isinstance(listed, Sequence)):
        raise DataError(f"'negatives' must be a list of texts, not {type(listed).__name__}", "write [...]")
    texts = [check_text(text, "negatives") for text in listed or ()]
    single = [(int(match[1] or 0), name) for name in row if (match := NUMBERED.fullmatch(name))]
    return texts + [check_text(row[name], name) for _, name in sorted(single) if row[name] is not None]


def _scores(row: Fields) -> tuple[float, ...]:
    """The number or the numbers of a row; empty without such a column."""
    name = _column(row, "score")
    value = row.get(name)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is None:
        return ()
    values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    for each in values:
        if not isinstance(each, int | float) or not math.isfinite(each):
            raise DataError(
                f"'{name}' must be a number or a list of numbers, not {str(value)[:40]!r}", "correct the row"
            )
    return tuple(map(float, values))
