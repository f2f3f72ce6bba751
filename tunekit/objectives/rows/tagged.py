"""Rows of words. Each word has a tag, which is predicted at the word's first token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunekit.contracts import Array, Row, RowLayout, RowParts, Span, default_labels
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.render import EMPTY_TEXT
from tunekit.errors import DataError
from tunekit.formats.tags import TagsExample
from tunekit.objectives.rows.labelled import LabelledTexts
from tunekit.objectives.rows.labels import utf8

SEPARATOR = "\n"  # between the tags of a row


class WordIds(list[int]):
    """The ids of a text. `firsts`: the positions where its words begin."""

    firsts: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class TaggedWords(LabelledTexts):
    """Rows of words with tags. Parts: `ids` (T,), the ids of the words joined by blanks, with special tokens around
    them; `firsts` (N,), the position where each word begins; `tags` as UTF-8."""

    example = "tags"
    places = "firsts"
    reads_pairs = False
    layout = RowLayout({"ids": "<i4", "firsts": "<i4", "tags": "u1"}, ("ids",), sizes=1)

    def labels_of(self, row: Row) -> list[str]:
        """The tag of each word."""
        return row.parts["tags"].tobytes().decode().split(SEPARATOR)

    def label_texts(self, row: Row) -> list[str]:
        return self.labels_of(row)

    def encode(self, example: TagsExample, origin: str) -> Row:
        """The row of an example. Raises: Dropped if no word has a token; DataError for an unlisted tag, or if some
        words have no token."""
        if not self.tokenizer.encode(" ".join(example.words), special_tokens_in_text=False):
            raise Dropped(EMPTY_TEXT)
        tags = self._names(example.tags)
        for tag in tags:
            self.labels.check(tag)
        ids = self.word_ids(example.words)
        return self.make_row(_parts(ids, ids.firsts, tags), origin)

    def units_in(self, parts: RowParts) -> int:
        return len(parts["firsts"])

    def prompt(self, example: TagsExample) -> tuple[list[int], str]:
        """The ids of the words, and their tags separated by blanks."""
        ids = self._cut_words(example.words)
        return ids, " ".join(map(self.labels.head_name, self._names(example.tags)[: len(ids.firsts)]))

    def question(self, text: str) -> list[int]:
        """The ids of a text, truncated in the same way as rows. The text's words are separated by blanks."""
        return self._cut_words(text.split())

    def first_label(self, ids: Sequence[int]) -> dict[str, Array]:
        """The arrays (parts) of a row with these ids. The first label stands in for the unknown tag of every word."""
        assert isinstance(ids, WordIds)
        return _parts(ids, ids.firsts, [self.labels.names[0]] * len(ids.firsts))

    def word_ids(self, words: Sequence[str]) -> WordIds:
        """The ids of the words, joined by blanks. Raises: DataError for a word in which no token begins."""
        text, (before, after) = " ".join(words), self.around
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])  # (words + 1,)
        inner, offsets = self.tokenizer.encode_with_offsets(text, special_tokens_in_text=False)
        begun = [start + len(text[start:end]) - len(text[start:end].lstrip()) for start, end in offsets]
        owners = np.searchsorted(starts, begun, side="right") - 1  # (T,)
        firsts: dict[int, int] = {}
        for place, (owner, start, (_, end)) in enumerate(zip(owners.tolist(), begun, offsets, strict=True)):
            if start < end:
                firsts.setdefault(owner, len(before) + place)
        missing = next((word for number, word in enumerate(words) if number not in firsts), None)
        if missing is not None:
            raise DataError(f"no token of the text begins in the word {missing!r}", "remove the word and its tag")
        ids = WordIds([*before, *inner, *after])
        ids.firsts = [firsts[number] for number in range(len(words))]
        return ids

    def _cut_words(self, words: Sequence[str]) -> WordIds:
        whole = self.word_ids(words)
        ids = WordIds(self.cut_ids(whole))
        ids.firsts = [place for place in whole.firsts if place < len(ids) - len(self.around[1])]
        return ids

    def _names(self, tags: Sequence[str | int]) -> list[str]:
        """The names of the tags. A tag that is a number is an index into the recipe's list of labels, or into a
        head's default names. Raises: DataError for an index outside that list."""
        unnamed = (names for names in (self.labels.names, self.labels.head) if names == default_labels(len(names)))
        listed = self.settings.labels or next(unnamed, ())
        for tag in tags:
            if isinstance(tag, int) and not 0 <= tag < len(listed):
                what = f"the tag {tag} is not the number of a label: objective.labels has {len(listed)} names"
                raise DataError(what, "list the names of all tags in objective.labels, in the order of their numbers")
        return [listed[tag] if isinstance(tag, int) else tag for tag in tags]

    def resized(self, row: Row, size: int) -> Row:
        """The row, cut or filled to `size` ids. It keeps the tags of the words whose first id it keeps."""
        firsts = row.parts["firsts"]
        inside = firsts[firsts < max(size - len(self.around[1]), 0)]
        parts = _parts(self.sized(row.parts["ids"], size), inside, self.labels_of(row)[: len(inside)])
        return self.make_row(parts, row.origin, row.number)

    def places_of(self, row: Row) -> Array:
        """The positions where words begin."""
        return row.parts["firsts"]

    def spans(self, row: Row) -> list[Span]:
        """The words, for preview. The title states their tags, and marks show the tokens at which tags are
        predicted."""
        ids = row.parts["ids"]
        marks = np.zeros(len(ids), np.bool_)
        marks[row.parts["firsts"]] = True
        return [Span(ids, marks, title=f"tags: {' '.join(self.labels_of(row))}")]


def _parts(ids: Sequence[int] | Array, firsts: Sequence[int] | Array, tags: Sequence[str]) -> dict[str, Array]:
    return {
        "ids": np.asarray(ids, dtype=np.int32),
        "firsts": np.asarray(firsts, dtype=np.int32),
        "tags": utf8(SEPARATOR.join(tags)),
    }
