"""Rows of texts with labels."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tunekit.contracts import (
    Array,
    Batch,
    EncodeOptions,
    Labels,
    Model,
    Row,
    RowKind,
    RowLayout,
    RowParts,
    Span,
    Tensors,
    Tokenizer,
)
from tunekit.data.batching.pad import lay_end_to_end, positions, real_positions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.render import EMPTY_TEXT
from tunekit.errors import DataError, InputError
from tunekit.formats.labels import LabelExample
from tunekit.model.text.generation import check_prompts
from tunekit.objectives.rows.labels import label_of, never_split, utf8
from tunekit.objectives.rows.pairs import PairIds, is_pair, join_texts, other_kind, sized_pair, types_of
from tunekit.objectives.rows.text import padding_id, put_around
from tunekit.recipe.bases.label_settings import LabelSettings

UNLABELLED = {"-1": "GLUE", "-": "SNLI"}  # in files of these data sets, this label means that a pair has no label
TWO_TEXTS = 'give both texts with --prompts FILE.jsonl: {"sentence1": "...", "sentence2": "..."} in each line'
JOINED = (
    "warning: pairs of texts joined without a separator, because this tokenizer has none; "
    "add a separator to the rows, such as a line break at the end of the first text"
)


@dataclass(frozen=True, eq=False)
class LabelledTexts(RowKind):
    """Rows of texts with labels. Parts: `ids` (T,), with the tokenizer's special tokens around the text; `second`, the
    index where the second text of a pair begins, (1,), or (0,) for a single text; `label` as UTF-8."""

    example = "label"
    allowed_options = never_split("text")  # because a split could be in the middle of a span
    packable = True
    places = "last"  # name of the target with the positions at which labels are predicted
    layout = RowLayout({"ids": "<i4", "second": "<i4", "label": "u1"}, ("ids",), sizes=1)
    reads_pairs = True

    settings: LabelSettings
    tokenizer: Tokenizer
    fingerprint: str
    options: EncodeOptions
    labels: Labels
    pairs: bool | None = None  # whether every row has two texts; None before all rows are seen
    notices: Counter[str] = field(default_factory=Counter)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens that are put before and after a text."""
        return put_around(self.tokenizer)

    @cached_property
    def padding(self) -> int:
        """The padding id."""
        return padding_id(self.tokenizer)

    @property
    def unknown_id(self) -> int | None:
        """The id of the tokenizer's unknown token."""
        return self.tokenizer.unknown_id

    def encode(self, example: Any, origin: str) -> Row:
        """The row of an example. Raises: Dropped for a text without a token; DataError for an unlisted label."""
        assert isinstance(example, LabelExample)
        if self.pairs not in (None, example.second is not None):
            raise DataError(*other_kind(not self.pairs, "each row that the model learns from is"))
        ids = self._ids_of(example.text, example.second)
        if not example.text.strip() or len(ids) == sum(map(len, self.around)):
            raise Dropped(EMPTY_TEXT)
        label = self.labels.read(example.label)
        if example.second is not None:
            self._check_pair(label)
        return self.make_row(_parts(ids, utf8(label)), origin)

    def _check_pair(self, label: str) -> None:
        """Check the label of a pair, and count a notice if the tokenizer has no separator.
        Raises: DataError if the label means that the pair is unlabelled (-1 or '-')."""
        for name in UNLABELLED.keys() & set(self.labels.listed_in(label)) - set(self.labels.names):
            what = f"the label is {name}; in files of {UNLABELLED[name]}, this means that a pair has no label"
            raise DataError(what, f"leave the row out, or list '{name}' under objective.labels if it is a class")
        if not self.tokenizer.pairing.between:
            self.notices[JOINED] += 1

    def _ids_of(self, text: str, second: str | None) -> list[int]:
        """The ids of one text or of a pair, with the tokenizer's special tokens."""
        return self.tokenizer.encode_source(text) if second is None else join_texts(self.tokenizer, text, second)

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        return (len(parts["ids"]),)

    def prompt(self, example: Any) -> tuple[list[int], str]:
        """The ids of the text or pair, and its label."""
        ids = self._ids_of(example.text, example.second)
        return self.cut_ids(ids), self.labels.written(self.labels.read(example.label))

    def question(self, text: str) -> list[int]:
        """The ids of a text with special tokens, truncated in the same way as rows. Raises: InputError if rows are
        pairs of texts."""
        if self.pairs:
            raise InputError("the prompt is a single text, but the model was trained on pairs of texts", TWO_TEXTS)
        return self.cut_ids(self.tokenizer.encode_source(text))

    def question_of_pair(self, first: str, second: str) -> list[int]:
        """The ids of a pair of texts with special tokens, truncated in the same way as rows. Raises: InputError if rows
        are single texts."""
        if self.pairs is False:
            what = f"the prompt is a pair of texts ('{first[:40]}' ...), but the model was trained on single texts"
            raise InputError(what, 'write {"prompt": "..."}')
        return self.cut_ids(join_texts(self.tokenizer, first, second))

    def readable(self, prompt: Sequence[int]) -> str:
        """The text of the prompt's ids."""
        return self.tokenizer.decode(prompt)

    def unlabelled(self, model: Model, prompts: Sequence[Sequence[int]]) -> list[Row]:
        """Rows for texts whose labels are not known. Raises: InputError for an empty text; DataError for a text that is
        longer than the model's maximum number of positions."""
        if not all(prompts):
            raise InputError("a text is empty, and this tokenizer adds no tokens to it", "write words to classify")
        check_prompts(prompts, model.base.family.learned_positions(model.base.net), model.virtual_tokens)
        return [self.make_row(self.first_label(ids), "") for ids in prompts]

    def first_label(self, ids: Sequence[int]) -> dict[str, Array]:
        """The arrays (parts) of a row with these ids. The first label stands in for the row's unknown label."""
        return _parts(ids, utf8(self.labels.placeholder))

    def cut_ids(self, ids: list[int]) -> list[int]:
        """The ids of a prompt, truncated in the same way as rows."""
        cut = self.options.excess_length == "truncate" and len(ids) > self.options.max_length
        return self.sized(ids, self.options.max_length) if cut else ids

    def sized(self, ids: Sequence[int] | Array, size: int) -> list[int]:
        """The ids of a text, cut or repeated to `size` ids. The special tokens at its end are kept, because heads
        search for these tokens.

        Shapes: ids (T,).
        """
        if isinstance(ids, PairIds):
            return sized_pair(self.tokenizer.pairing, ids, size)
        text, end = np.split(np.asarray(ids, np.int32), [len(ids) - len(self.around[1])])
        sized: list[int] = np.concatenate([np.resize(text, max(size - len(end), 0)), end])[:size].tolist()
        return sized

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """A row of this size, made by repeating ids."""
        return [self.resized(next(rows), size)]

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with its first `stop` tokens, including the special tokens at the end. Rows are never cut at their
        beginning, so `start` is ignored."""
        return self.resized(row, min(stop, row.size))

    def resized(self, row: Row, size: int) -> Row:
        """The row with `size` ids and the same label."""
        parts = _parts(self.sized(_ids_in(row), size), row.parts["label"])
        return self.make_row(parts, row.origin, row.number)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. Its targets are the labels of all rows, in order, and the positions at which labels are
        predicted. `places` names the target with these positions, which index the flattened (B, T).

        Shapes: input_ids, position_ids (B, T); attention_mask if there is padding; token_type_ids for pairs, if the
        tokenizer has types; labels, last (R,).
        """
        ids = lay_end_to_end([[row.parts["ids"] for row in rows] for rows in sequences], self.padding)
        sizes = [[row.size for row in rows] for rows in sequences]
        inputs: Tensors = {"input_ids": ids, "position_ids": positions(sizes)}
        if len(sequences) > 1 and all(
            len(rows) == 1 for rows in sequences
        ):  # a mask would hide where packed rows begin
            inputs["attention_mask"] = real_positions([sum(each) for each in sizes]).long()
        if any(is_pair(row) for rows in sequences for row in rows) and self.tokenizer.pairing.types:
            inputs["token_type_ids"] = lay_end_to_end([list(map(self.types_in, rows)) for rows in sequences], 0)
        places = []
        for line, rows in enumerate(sequences):
            ends = ids.shape[1] * line + np.cumsum([row.size for row in rows])
            places += [end - row.size + self.places_of(row) for row, end in zip(rows, ends, strict=True)]
        labels = self.labels.targets(label for rows in sequences for row in rows for label in self.label_texts(row))
        targets = {"labels": labels, self.places: torch.from_numpy(np.concatenate(places)).long()}
        return Batch(inputs, targets, tuple(map(tuple, sequences)))

    def label_texts(self, row: Row) -> list[str]:
        """The label texts of the row, one for each position in `places_of`."""
        return [label_of(row)]

    def places_of(self, row: Row) -> Array:
        """The position that predicts the row's label: its last token."""
        return np.array([row.size - 1])

    def types_in(self, row: Row) -> Array:
        """The token type of each id, shape (T,); 0 in a single text."""
        ids = _ids_in(row)
        return types_of(self.tokenizer.pairing, ids) if isinstance(ids, PairIds) else np.zeros(len(ids), np.int64)

    def spans(self, row: Row) -> list[Span]:
        """The text, or both texts of a pair, for preview. The title states the label. No token is predicted."""
        ids, title = _ids_in(row), f"label: {label_of(row)}"
        if not isinstance(ids, PairIds):
            return [Span(row.parts["ids"], np.zeros(len(ids), np.bool_), title=title)]
        spans, types = [], self.types_in(row)
        for name, part in (("first", slice(0, ids.second)), ("second", slice(ids.second, len(ids)))):
            text_ids, kinds = row.parts["ids"][part], " and ".join(map(str, np.unique(types[part])))
            marks = f", token type {kinds}" if self.tokenizer.pairing.types else ""
            start = f"{title}; " if name == "first" else ""
            spans.append(Span(text_ids, np.zeros(len(text_ids), np.bool_), title=f"{start}{name} text{marks}"))
        return spans


def _ids_in(row: Row) -> PairIds | list[int]:
    """The ids of a row. If the row has two texts, the result is a PairIds."""
    ids = row.parts["ids"]
    return PairIds(ids, int(row.parts["second"][0])) if is_pair(row) else ids.tolist()


def _parts(ids: Sequence[int] | Array, label: Array) -> dict[str, Array]:
    second = [ids.second] if isinstance(ids, PairIds) else []
    return {"ids": np.asarray(ids, dtype=np.int32), "second": np.array(second, dtype=np.int32), "label": label}
