"""`format: reranking`: a query and documents, for rerankers: `{"query": ..., "document": ..., "label": 1}`,
`{"query": ..., "documents": [...], "labels": [...]}`, or `{"query": ..., "positive": ..., "negatives": [...]}`.

The names of columns decide their roles, never their order.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tunekit.errors import DataError
from tunekit.formats.embedding import NUMBERED
from tunekit.formats.fields import Fields, check_text, read_text

QUERIES = ("query", "anchor", "question", "sentence1", "premise", "text1", "sentence_a")
LISTS = ("documents", "docs", "passages", "candidates")
SINGLE = ("document", "answer", "passage", "context", "response", "sentence2", "hypothesis", "text2", "sentence_b")
POSITIVES = ("positive", "positives")
LABELS = ("labels", "label", "scores", "score", "similarity", "relevance")
DESCRIPTION = (
    "query (or anchor, question, sentence1); document (or answer, passage, sentence2) and label, or documents (or "
    "docs, passages) and labels: how relevant each document is; or positive, and negative, negative_1 ... or "
    "negatives: texts, or lists"
)
FIELDS = (
    *("query", "documents", "document", "positive", "negatives", "negative"),
    *(f"negative_{number}" for number in range(100)),
    "labels",
)
REQUIRED = ("query", "documents")
EXAMPLE = "reranking"


@dataclass(frozen=True)
class RerankingExample:
    """A query and its documents. `labels`: how relevant each document is, or the scores of a teacher; empty if the
    row has none. `positives`: without labels, how many of the first documents are relevant; 0 if that is unknown."""

    query: str
    documents: tuple[str, ...]
    labels: tuple[float, ...] = ()
    positives: int = 0


def aliases_of(row: Fields) -> Mapping[str, str]:
    """Alternative names of columns that this row has: name -> field. Documents may have several columns."""
    names = dict.fromkeys(QUERIES, "query") | dict.fromkeys((*LISTS, *SINGLE, *POSITIVES), "documents")
    names |= dict.fromkeys(LABELS, "labels") | {name: name for name in row if NUMBERED.fullmatch(name)}
    return {name: field for name, field in names.items() if name in row}


def make_example(row: Fields) -> RerankingExample:
    """The query, the documents and their labels. Raises: DataError if two columns could have one role, or for wrong
    values."""
    query = read_text(row, _column(row, QUERIES, "query") or "query")
    listed = _column(row, LISTS, "documents")
    single = _column(row, (*SINGLE, *POSITIVES), "document")
    if listed and single:
        what = f"the columns '{listed}' and '{single}' could both be the documents"
        raise DataError(what, f"map the right column under data.train[].columns, for example {{{listed}: documents}}")
    labels = _labels(row)
    if listed:
        documents = _texts(row[listed], listed)
        if labels and len(labels) != len(documents):
            what = f"the row has {len(documents)} documents and {len(labels)} labels"
            raise DataError(what, "write one label for each document in the list 'labels'")
        return RerankingExample(query, documents, labels)
    positives = _texts(row[single], single) if single else (read_text(row, "document"),)
    negatives = tuple(text for _, name in _negatives(row) for text in _texts(row[name], name))
    return RerankingExample(query, (*positives, *negatives), labels, 0 if labels else len(positives))


def _column(row: Fields, names: Sequence[str], role: str) -> str | None:
    """The name of the column with this role; None if there is none."""
    present = [name for name in names if row.get(name) is not None]
    if len(present) > 1 and role not in present:
        what = f"the columns '{present[0]}' and '{present[1]}' could both be the {role}"
        raise DataError(what, f"map the right column under data.train[].columns, for example {{{present[0]}: {role}}}")
    return role if role in present else next(iter(present), None)


def _negatives(row: Fields) -> list[tuple[int, str]]:
    """The columns with negatives: the list first, then single columns by their number."""
    single = [(int(match[1] or 0), name) for name in row if (match := NUMBERED.fullmatch(name))]
    names = [*([(-1, "negatives")] if "negatives" in row else []), *sorted(single)]
    return [(number, name) for number, name in names if row[name] is not None]


def _texts(value: object, name: str) -> tuple[str, ...]:
    """A text, or the texts of a list."""
    if isinstance(value, str):
        if name in (*LISTS, "negatives"):
            with suppress(ValueError, RecursionError):
                if isinstance(listed := json.loads(value), list):
                    return _texts(listed, name)
            raise DataError(f"'{name}' must be a list of texts, not a text", 'write ["...", "..."]')
        return (check_text(value, name),)
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise DataError(f"'{name}' must be a text or a list of texts, not {type(value).__name__}", "write [...]")
    return tuple(check_text(text, name) for text in value)


def _labels(row: Fields) -> tuple[float, ...]:
    """The label or the labels of a row; empty without such a column."""
    name = _column(row, LABELS, "labels")
    value = row.get(name) if name else None
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is None:
        return ()
    values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    for each in values:
        if not isinstance(each, int | float) or not math.isfinite(each):
            what = f"'{name}' must be a number or a list of numbers, not {str(value)[:40]!r}"
            raise DataError(what, "correct the row")
    return tuple(map(float, values))
