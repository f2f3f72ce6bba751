"""Rows of several texts, each of which gets an embedding: an anchor, a positive, and any negatives."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch

from tunekit.contracts import Array, Batch, EncodeOptions, Row, RowKind, RowLayout, RowParts, Span, Tensors, Tokenizer
from tunekit.data.batching.pad import lay_end_to_end, positions, real_positions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.render import EMPTY_TEXT
from tunekit.errors import DataError
from tunekit.formats.embedding import EmbeddingExample
from tunekit.objectives.rows.labels import never_split
from tunekit.objectives.rows.text import put_around
from tunekit.recipe.objectives.embed import ENCLOSED, SCORED, TAUGHT, EmbedSettings

TWICE = "two texts of the row are equal"
SHORTENED = "texts cut to the model's maximum length"


@dataclass(frozen=True, eq=False)
class TextGroups(RowKind):
    """Rows of several texts. Each text is a padded line of the batch, row after row. Parts: `ids`, the ids of all texts
    with the tokenizer's special tokens; `counts`, the number of ids of each text; `scores`, the row's numbers; `keys`,
    the hash of each text. If a guide reads the texts with a tokenizer of its own: `texts`, their UTF-8 bytes, and
    `text_bytes`, the number of bytes of each.

    `query`, `document`: the prompt and the maximum number of tokens of anchors, and of all other texts.
    """

    example = "embedding"
    allowed_options = never_split("text")

    settings: EmbedSettings
    tokenizer: Tokenizer
    fingerprint: str
    options: EncodeOptions
    query: tuple[str, int | None] = ("", None)
    document: tuple[str, int | None] = ("", None)
    notices: Counter[str] = field(default_factory=Counter)

    @cached_property
    def layout(self) -> RowLayout:
        """The sizes of a row: the tokens of its longest text, and of all its other texts."""
        plain = {"texts": "u1", "text_bytes": "<i4"} if self.keeps_texts else {}
        return RowLayout(
            {"ids": "<i4", "counts": "<i4", "scores": "<f8", "keys": "<u8", **plain},
            ("ids",),
            sizes=2,
            token_sizes=(0,),
            identity=("counts", "scores"),
            distinct="keys" if self.settings.ranks else None,
        )

    @property
    def keeps_texts(self) -> bool:
        """Whether rows have their texts, for a guide."""
        return self.settings.guide is not None

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens that are put before and after a text."""
        return put_around(self.tokenizer)

    @property
    def documents(self) -> Documents | None:
        options = replace(self.options, excess_length="truncate")
        parts = self.settings, self.tokenizer, f"{self.fingerprint} documents", options, self.query, self.document
        return None if self.settings.loss in SCORED else Documents(*parts)

    @property
    def unknown_id(self) -> int | None:
        return self.tokenizer.unknown_id

    def encode(self, example: EmbeddingExample, origin: str) -> Row:
        """The row of an example. Raises: Dropped for an empty text, or if two texts are equal although they should
        differ; DataError if the loss cannot use the row."""
        _check_texts(self.settings, example)
        if not all(text.strip() for text in example.texts):
            raise Dropped(EMPTY_TEXT)
        keys = [text_key(text) for text in example.texts]
        if self.settings.loss not in SCORED and len(set(keys)) < len(keys):
            raise Dropped(TWICE)
        texts = [
            self.ids_of(text, *(self.document if place else self.query)) for place, text in enumerate(example.texts)
        ]
        parts = _parts(texts, np.array(example.scores), np.array(keys, np.uint64))
        return self.make_row(parts | (_plain(example.texts) if self.keeps_texts else {}), origin)

    def within(self, room: int) -> Self:
        """A copy that cuts all texts to `room` tokens too."""
        query, document = ((prompt, min(length or room, room)) for prompt, length in (self.query, self.document))
        return replace(self, query=query, document=document)

    def text_row(self, text: str, side: str) -> Row:
        """The row of a single text. `side`: "query" or "document", whose prompt and maximum length it gets."""
        ids = self.ids_of(text, *(self.query if side == "query" else self.document))
        return self.make_row(_parts([ids], np.zeros(0), np.array([text_key(text)], np.uint64)), "")

    def ids_of(self, text: str, prompt: str, limit: int | None) -> list[int]:
        """The ids of a prompt and a text, cut to the limit. The special tokens at the end are kept."""
        ids = self.tokenizer.encode_source(prompt + text)
        if limit is None or len(ids) <= limit:
            return ids
        self.notices[SHORTENED] += 1
        return self.sized(ids, limit)

    def cut_texts(self, example: EmbeddingExample) -> list[str]:
        names = ["anchor", "positive", *(f"negative {number}" for number in range(1, len(example.texts) - 1))]
        sides = [self.query, *[self.document] * (len(names) - 1)]
        return [
            name
            for name, text, (prompt, limit) in zip(names, example.texts, sides, strict=True)
            if limit is not None and len(self.tokenizer.encode_source(prompt + text)) > limit
        ]

    def sized(self, ids: Sequence[int] | Array, size: int) -> list[int]:
        """The ids of a text, cut or repeated to `size` ids. The special tokens at its end are kept."""
        text, end = np.split(np.asarray(ids, np.int32), [len(ids) - len(self.around[1])])
        sized: list[int] = np.concatenate([np.resize(text, max(size - len(end), 0)), end])[:size].tolist()
        return sized

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        counts = parts["counts"]
        longest = int(counts.max(initial=0))
        return longest, int(counts.sum()) - longest

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with at most `stop` tokens of each text. Texts are never cut at their beginning."""
        texts = [self.sized(ids, min(len(ids), stop)) for ids in texts_of(row)]
        return self._with_texts(row, texts)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """A row whose texts all have this size."""
        row = next(rows)
        filled = self._with_texts(row, [self.sized(ids, size) for ids in texts_of(row)])
        if not self.keeps_texts:
            return [filled]
        plain = _plain([" ".join(np.resize(text.split(), size)) for text in plain_texts(row)])
        return [replace(filled, parts={**filled.parts, **plain})]

    def _with_texts(self, row: Row, texts: Sequence[Sequence[int]]) -> Row:
        parts = {**row.parts, **_parts(texts, row.parts["scores"], row.parts["keys"])}
        return replace(self.make_row(parts, row.origin, row.number), occurrence=row.occurrence)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch, with one line for each text. Values that a step added to the rows become targets.

        Shapes: input_ids, position_ids, attention_mask (N, T); lengths (N,); counts (R,), the number of texts of each
        row.
        """
        rows = [row for sequence in sequences for row in sequence]
        texts = [ids for row in rows for ids in texts_of(row)]
        lengths = [len(ids) for ids in texts]
        inputs: Tensors = {
            "input_ids": lay_end_to_end([[ids] for ids in texts], self.tokenizer.pad_id),
            "position_ids": positions([[length] for length in lengths]),
            "attention_mask": real_positions(lengths).long(),
        }
        targets = {"lengths": torch.tensor(lengths), "counts": torch.tensor([len(row.parts["counts"]) for row in rows])}
        added = [name for name in rows[0].parts if name not in self.layout.parts]
        targets |= {name: torch.from_numpy(np.concatenate([row.parts[name] for row in rows])) for name in added}
        return Batch(inputs, targets, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Span]:
        """The texts of the row, for preview. No token is predicted."""
        numbers = ", ".join(f"{number:g}" for number in row.parts["scores"])
        names = ["anchor", "positive"] if self.settings.loss not in SCORED else ["first text", "second text"]
        names += [f"negative {number + 1}" for number in range(len(row.parts["counts"]) - 2)]
        titles = [names[0] + (f"; score: {numbers}" if numbers else ""), *names[1:]]
        return [
            Span(ids, np.zeros(len(ids), np.bool_), title=title)
            for ids, title in zip(texts_of(row), titles, strict=True)
        ]


class Documents(TextGroups):
    """Documents to search: rows of one text."""

    example = "document"
    keeps_texts = False

    def encode(self, example: EmbeddingExample, origin: str) -> Row:
        """The row of a document. Raises: Dropped for an empty text."""
        [text] = example.texts
        if not text.strip():
            raise Dropped(EMPTY_TEXT)
        keys = np.array([text_key(text)], np.uint64)
        return self.make_row(_parts([self.ids_of(text, *self.document)], np.array([]), keys), origin)


def texts_of(row: Row) -> list[Array]:
    """The ids of each text of a row."""
    return np.split(row.parts["ids"], np.cumsum(row.parts["counts"])[:-1])


def plain_texts(row: Row) -> list[str]:
    """The texts of a row that keeps them."""
    return [part.tobytes().decode() for part in np.split(row.parts["texts"], np.cumsum(row.parts["text_bytes"])[:-1])]


def _plain(texts: Sequence[str]) -> dict[str, Array]:
    encoded = [text.encode() for text in texts]
    sizes = np.array(list(map(len, encoded)), np.int32)
    return {"texts": np.frombuffer(b"".join(encoded), np.uint8), "text_bytes": sizes}


def text_key(text: str) -> int:
    """A 64-bit hash of a text. It ignores differences in white space and in Unicode's forms of a character."""
    normal = " ".join(unicodedata.normalize("NFKC", text).split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


def _parts(texts: Sequence[Sequence[int]], scores: Array, keys: Array) -> dict[str, Array]:
    counts = np.array([len(ids) for ids in texts], np.int32)
    return {"ids": np.concatenate(texts).astype(np.int32), "counts": counts, "scores": scores, "keys": keys}


def _check_texts(settings: EmbedSettings, example: EmbeddingExample) -> None:
    """Raises: DataError if the row has other texts or scores than the loss compares."""
    loss, texts, scores = settings.loss, len(example.texts), example.scores
    how = "correct the row, map its columns under data.train[].columns, or choose another objective.loss"
    if loss in SCORED:
        if texts != 2 or len(scores) != 1:
            what = f"the row has {texts} texts and {len(scores)} scores, but {loss} reads 2 texts and 1 score"
            raise DataError(what, how)
        low, high = ENCLOSED.get(loss, (-np.inf, np.inf))
        if not low <= scores[0] <= high or (loss == "online_contrastive" and scores[0] not in (0, 1)):
            between = "either 0 or 1" if loss == "online_contrastive" else f"from {low:g} to {high:g}"
            raise DataError(f"the score of the row is {scores[0]:g}, but {loss} reads numbers {between}", how)
    elif loss in TAUGHT:
        allowed = (texts - 1, texts - 2) if loss == "margin_mse" else (texts - 1,)
        if texts < 3 or len(scores) not in allowed:
            wanted = "a positive, a negative, and a teacher's score of each"
            raise DataError(
                f"the row has {texts - 1} documents and {len(scores)} scores, but {loss} reads {wanted}", how
            )
    elif scores or texts < 2 + (loss == "triplet"):
        wanted = "an anchor, a positive and a negative" if loss == "triplet" else "texts"
        what = f"the row has {texts} texts and {len(scores)} scores, but {loss} reads {wanted}, and no scores"
        raise DataError(what, how)
