"""Rows of a query and its documents, each of which gets a score."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from tunekit.contracts import Array, Batch, EncodeOptions, Row, RowKind, RowLayout, RowParts, Span, Tensors, Tokenizer
from tunekit.data.batching.pad import lay_end_to_end, positions, real_positions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.render import EMPTY_TEXT
from tunekit.errors import DataError
from tunekit.formats.reranking import RerankingExample
from tunekit.objectives.losses.ranking import units_of
from tunekit.objectives.rows.labels import never_split
from tunekit.objectives.rows.pairs import PairIds, join_texts, sized_pair, types_of
from tunekit.objectives.rows.text import padding_id, put_around
from tunekit.objectives.rows.texts import text_key
from tunekit.recipe.objectives.rerank import ENCLOSED, RerankSettings

TWICE = "two documents of the row are equal"
ALIKE = "the row gives the loss nothing to compare (it has one document, or equal labels)"
HOW = "correct the row, map its columns under data.train[].columns, or choose another objective.loss"


@dataclass(frozen=True, eq=False)
class CandidateRows(RowKind):
    """Rows of a query and its documents. Each document with its query is a padded line of the batch, row after row.
    Parts: `ids`, the ids of all lines; `counts`, the number of ids of each line; `seconds`, where the document begins
    in each line, empty with a template; `labels`, of each document; `keys`, the hashes of the query and of each
    document; `texts`, these texts as JSON, if a step draws documents of other rows.

    `template`: the text of a line with {query} and {document}, and with the tokens before a text; None: the tokenizer
    joins a pair of texts.
    """

    example = "reranking"
    allowed_options = never_split("text")

    settings: RerankSettings
    tokenizer: Tokenizer
    fingerprint: str
    options: EncodeOptions
    template: str | None = None
    notices: Counter[str] = field(default_factory=Counter)

    @cached_property
    def layout(self) -> RowLayout:
        """The sizes of a row: the tokens of its longest line, and of all its other lines."""
        parts = {"ids": "<i4", "counts": "<i4", "seconds": "<i4", "labels": "<f8", "keys": "<u8", "texts": "u1"}
        return RowLayout(parts, ("ids",), sizes=2, token_sizes=(0,), identity=("counts", "labels"))

    @cached_property
    def ending(self) -> list[int]:
        """The ids at the end of a line that is not a pair; they are kept when the line is cut."""
        if self.template is None:
            return put_around(self.tokenizer)[1]
        after = self.template[max(self.template.index(field) + len(field) for field in ("{query}", "{document}")) :]
        return self.tokenizer.encode(after)

    @property
    def unknown_id(self) -> int | None:
        return self.tokenizer.unknown_id

    def examples(self, example: RerankingExample) -> Sequence[RerankingExample]:
        """With a loss for one positive: one example for each positive, with all negatives."""
        count, documents = example.positives, example.documents
        if not (self.settings.draws and count > 1):
            return [example]
        return [
            replace(example, documents=(positive, *documents[count:]), positives=1) for positive in documents[:count]
        ]

    def encode(self, example: RerankingExample, origin: str) -> Row:
        """The row of an example. Raises: Dropped for an empty text, for equal documents, or if the loss has nothing to
        compare; DataError if the loss cannot use the row."""
        labels, texts = _labels_of(self.settings, example), (example.query, *example.documents)
        if not all(text.strip() for text in texts):
            raise Dropped(EMPTY_TEXT)
        keys = [text_key(text) for text in texts]
        if len(set(keys[1:])) < len(keys) - 1:
            raise Dropped(TWICE)
        if not units_of(self.settings.loss, labels):
            raise Dropped(ALIKE)
        return self.row_of(texts, labels, origin)

    def row_of(self, texts: Sequence[str], labels: Sequence[float], origin: str = "") -> Row:
        """The row of a query and its documents. `texts`: the query, then the documents."""
        lines = [self.line(texts[0], document) for document in texts[1:]]
        text_bytes = json.dumps(list(texts)).encode() if self.settings.draws else b""
        parts = {
            **_parts(lines),
            "labels": np.array(labels, np.float64),
            "keys": np.array([text_key(text) for text in texts], np.uint64),
            "texts": np.frombuffer(text_bytes, np.uint8),
        }
        return self.make_row(parts, origin)

    def line(self, query: str, document: str) -> list[int]:
        """The ids of a query with a document. Raises: Dropped if a text has no token."""
        if self.template is None:
            return join_texts(self.tokenizer, query, document)
        return self.tokenizer.encode(filled(self.template, query, document))

    def pair_row(self, query: str, document: str, limit: int) -> Row:
        """The row of a query and one document without a label, cut to `limit` ids. Raises: DataError for a text without
        a token."""
        try:
            if not query.strip() or not document.strip():
                raise Dropped(EMPTY_TEXT)
            return self.cut(self.row_of((query, document), [0.0]), 0, limit)
        except Dropped as reason:
            raise DataError(str(reason), "write at least one word in the query and in each document") from None

    def with_documents(self, row: Row, documents: Sequence[str], limit: int) -> Row:
        """The row with further documents, whose label is 0. Their lines are cut to `limit` ids."""
        query = texts_of(row)[0]
        lines = [self.sized(ids, min(len(ids), limit)) for ids in (self.line(query, text) for text in documents)]
        return self._with_lines(row, [*lines_of(row), *lines], [text_key(text) for text in documents])

    def repeated(self, row: Row, count: int) -> Row:
        """The row with `count` further documents, whose lines are copies of its longest line."""
        lines = lines_of(row)
        return self._with_lines(row, [*lines, *[max(lines, key=len)] * count])

    def _with_lines(self, row: Row, lines: Sequence[Sequence[int]], more_keys: Sequence[int] = ()) -> Row:
        """The row with these lines. `more_keys`: the hashes of documents that it did not have; their label is 0."""
        labels = np.zeros(len(lines))
        labels[: len(row.parts["labels"])] = row.parts["labels"]
        keys = np.append(row.parts["keys"], np.array(more_keys, np.uint64))
        parts = {**row.parts, **_parts(lines), "labels": labels, "keys": keys}
        return replace(self.make_row(parts, row.origin, row.number), occurrence=row.occurrence)

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        counts = parts["counts"]
        longest = int(counts.max(initial=0))
        return longest, int(counts.sum()) - longest

    def sized(self, ids: Sequence[int], size: int) -> list[int]:
        """The ids of a line, cut or repeated to `size` ids. A pair is cut as by the tokenizer; the ids after the
        document are kept."""
        if isinstance(ids, PairIds):
            return sized_pair(self.tokenizer.pairing, ids, size)
        text, end = np.split(np.asarray(ids, np.int32), [max(len(ids) - len(self.ending), 0)])
        sized: list[int] = np.concatenate([np.resize(text, max(size - len(end), 0)), end])[:size].tolist()
        return sized

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with at most `stop` tokens in each line. Lines are never cut at their beginning."""
        return self._with_lines(row, [self.sized(ids, min(len(ids), stop)) for ids in lines_of(row)])

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """A row whose lines all have this size."""
        row = next(rows)
        return [self._with_lines(row, [self.sized(ids, size) for ids in lines_of(row)])]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch, with one line for each document.

        Shapes: input_ids, position_ids, attention_mask, token_type_ids (N, T); last (N,), the last position of each
        line in the flattened (N, T); labels (N,); counts (R,), the number of documents of each row.
        """
        rows = [row for sequence in sequences for row in sequence]
        lines = [ids for row in rows for ids in lines_of(row)]
        lengths = [len(ids) for ids in lines]
        ids = lay_end_to_end([[np.asarray(line, np.int32)] for line in lines], padding_id(self.tokenizer))
        inputs: Tensors = {
            "input_ids": ids,
            "position_ids": positions([[length] for length in lengths]),
            "attention_mask": real_positions(lengths).long(),
        }
        pairing = self.tokenizer.pairing if self.template is None else None
        if pairing is not None and pairing.types:
            types = [[types_of(pairing, line)] for line in lines if isinstance(line, PairIds)]
            inputs["token_type_ids"] = lay_end_to_end(types, 0)
        last = torch.arange(len(lines)) * ids.shape[1] + torch.tensor(lengths) - 1
        labels = np.concatenate([row.parts["labels"] for row in rows])
        counts = torch.tensor([len(row.parts["counts"]) for row in rows])
        targets = {"last": last, "labels": torch.from_numpy(labels).float(), "counts": counts}
        return Batch(inputs, targets, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Span]:
        """The lines of the row, for preview. No token is predicted."""
        labels = row.parts["labels"]
        return [
            Span(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), title=f"document {number}; label: {label:g}")
            for number, (ids, label) in enumerate(zip(lines_of(row), labels, strict=True), 1)
        ]


def filled(template: str, query: str, document: str) -> str:
    """The template with both texts. A text may itself contain {document}."""
    texts = {"{query}": query, "{document}": document}
    first, second = sorted(texts, key=template.index)
    before, _, rest = template.partition(first)
    between, _, after = rest.partition(second)
    return f"{before}{texts[first]}{between}{texts[second]}{after}"


def lines_of(row: Row) -> list[list[int]]:
    """The ids of each line of a row; a PairIds if the tokenizer joined two texts."""
    lines = np.split(row.parts["ids"], np.cumsum(row.parts["counts"])[:-1])
    if not len(row.parts["seconds"]):
        return [line.tolist() for line in lines]
    return [PairIds(line, int(second)) for line, second in zip(lines, row.parts["seconds"], strict=True)]


def texts_of(row: Row) -> list[str]:
    """The query and the documents of a row, of a loss that draws documents of other rows."""
    texts: list[str] = json.loads(row.parts["texts"].tobytes())
    return texts


def _parts(lines: Sequence[Sequence[int]]) -> dict[str, Array]:
    seconds = [ids.second for ids in lines if isinstance(ids, PairIds)]
    return {
        "ids": np.concatenate([np.asarray(ids, np.int32) for ids in lines]),
        "counts": np.array([len(ids) for ids in lines], np.int32),
        "seconds": np.array(seconds, np.int32),
    }


def _labels_of(settings: RerankSettings, example: RerankingExample) -> list[float]:
    """The label of each document. Raises: DataError if the row has other documents or labels than the loss reads."""
    loss, documents, labels = settings.loss, len(example.documents), list(example.labels)
    if settings.draws:
        if labels or not example.positives:
            what = f"the row has labels, but {loss} reads a query, a positive and any negatives"
            raise DataError(what, HOW)
        return [1.0, *[0.0] * (documents - 1)]
    if loss == "margin_mse":
        if documents < 2 or len(labels) not in (documents, documents - 1):
            wanted = "a positive, a negative, and a teacher's score of each"
            what = f"the row has {documents} documents and {len(labels)} labels, but {loss} reads {wanted}"
            raise DataError(what, HOW)
        return labels if len(labels) == documents else [0.0, *(-margin for margin in labels)]
    if not labels and loss != "mse" and 0 < example.positives < documents:
        return [1.0] * example.positives + [0.0] * (documents - example.positives)
    if len(labels) != documents:
        what = f"the row has {documents} documents and {len(labels)} labels, but {loss} reads one label of each"
        raise DataError(what, HOW)
    low, high = ENCLOSED.get(loss, (-np.inf, np.inf))
    if wrong := [label for label in labels if not low <= label <= high]:
        raise DataError(f"a label is {wrong[0]:g}, but {loss} reads numbers from {low:g} to {high:g}", HOW)
    return labels
