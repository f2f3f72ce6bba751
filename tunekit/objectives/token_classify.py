"""Token classification: cross entropy on one tag for each word.

Comes in: words with tags, then a Batch and the model's logits.  Goes out: rows, then Loss (sum over words).
A word's tag is predicted at the first of its tokens; the others have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import Batch, ModelOutput, Part, Row, RowLayout, Sums, Tokenizer
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError
from tunekit.formats.tags import TagsExample
from tunekit.machine.placing import placed
from tunekit.metrics.span_f1 import find_spans, kinds_of
from tunekit.objectives.labelled import EMPTY_TEXT, LabelTextObjective, make_objective_of
from tunekit.objectives.rows import TextEncoder
from tunekit.recipe.objectives.token_classify import TokenClassifySettings

BETWEEN = "\n"  # of the tags of a row


class WordIds(list[int]):
    """Ids of a text that know where its words begin."""

    firsts: Sequence[int] = ()


class TokenClassifyEncoder(TextEncoder):
    """A row is words with a blank between them and special tokens around them, and tags at each word's first token."""

    def __init__(self, objective: TokenClassify, options: EncodeOptions) -> None:
        super().__init__(objective.tokenizer, options)
        self.objective, self.options = objective, options

    def encode(self, example: TagsExample, origin: str) -> Row:
        """The row. Raises: Dropped where there is no word; DataError for a tag beyond those that were given, or a word
        without a token."""
        if not example.words:
            raise Dropped(EMPTY_TEXT)
        tags = self._named(example.tags)
        for tag in tags:
            self.objective.check_label(tag)
        ids = self.laid_out(example.words)
        return make_row(ids, ids.firsts, tags, origin)

    def prompt(self, example: TagsExample) -> tuple[list[int], str] | None:
        """Ids of the words, and their tags with a blank between them."""
        ids = self._cut(self.laid_out(example.words))
        return ids, " ".join(self._named(example.tags)[: len(ids.firsts)])

    def question(self, text: str) -> list[int]:
        """Ids of a text whose words are what blanks separate, cut where rows are."""
        return self._cut(self.laid_out(text.split()))

    def laid_out(self, words: Sequence[str]) -> WordIds:
        """Ids of the words. Raises: DataError for a word none of whose characters begins a token."""
        text, (before, after) = " ".join(words), self.objective.around
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
            raise DataError(f"the word {missing!r} has no token of its own", "leave it and its tag out")
        ids = WordIds([*before, *inner, *after])
        ids.firsts = [firsts[number] for number in range(len(words))]
        return ids

    def _cut(self, ids: WordIds) -> WordIds:
        kept = WordIds(self.objective.cut_ids(ids, self.options))
        kept.firsts = [place for place in ids.firsts if place < len(kept) - len(self.objective.around[1])]
        return kept

    def _named(self, tags: Sequence[str | int]) -> list[str]:
        """Names of the tags, those of numbers from the recipe's list. Raises: DataError where it has none."""
        listed = self.objective.settings.labels
        for tag in tags:
            if isinstance(tag, int) and not 0 <= tag < len(listed):
                what = f"the tag {tag} is a number, and objective.labels has {len(listed)} names"
                raise DataError(what, "list the names of all tags there, in the order of their numbers from 0")
        return [listed[tag] if isinstance(tag, int) else tag for tag in tags]


def make_row(ids: Any, firsts: Any, tags: Sequence[str], origin: str, number: int = 0) -> Row:
    """A row of (T,) ids, the places where words begin, and their tags, each of which the loss counts."""
    parts: dict[str, NDArray[Any]] = {
        "ids": np.asarray(ids, np.int32),
        "firsts": np.asarray(firsts, np.int32),
        "tags": np.frombuffer(BETWEEN.join(tags).encode(), np.uint8),
    }
    return Row(parts, (len(parts["ids"]),), len(tags), origin, number)


class TokenClassify(LabelTextObjective):
    """loss = sum over words of -log p(tag | text); divided by the step's number of words."""

    settings: TokenClassifySettings
    metrics: Sequence[str] = ("loss", "token_accuracy", "span_f1")
    layout = RowLayout({"ids": "<i4", "firsts": "<i4", "tags": "u1"}, ("ids",), sizes=1)

    def labels_of(self, row: Row) -> list[str]:
        return row.parts["tags"].tobytes().decode().split(BETWEEN)

    def row_encoder(self, options: EncodeOptions) -> TokenClassifyEncoder:
        """Raises: RecipeError where a long text would be split, perhaps in the middle of a span."""
        self.check_options(options)
        return TokenClassifyEncoder(self, options)

    def resized(self, row: Row, size: int) -> Row:
        """So many ids, with the tags of the words that begin in them."""
        firsts = row.parts["firsts"]
        kept = firsts[firsts < max(size - len(self.around[1]), 0)]
        ids = self.sized(row.parts["ids"], size)
        return make_row(ids, kept, self.labels_of(row)[: len(kept)], row.origin, row.number)

    def asked(self, ids: Sequence[int]) -> Row:
        assert isinstance(ids, WordIds)
        return make_row(ids, ids.firsts, [self.labels[0]] * len(ids.firsts), "")

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Labels are those of all words in order, and `firsts` where each begins in the flattened positions.

        Shapes: those of inputs; labels, firsts (N,).
        """
        inputs = self.inputs(sequences)
        width = inputs["input_ids"].shape[1]
        places = []
        for line, rows in enumerate(sequences):
            ends = np.cumsum([row.size for row in rows])
            places += [width * line + end - row.size + row.parts["firsts"] for row, end in zip(rows, ends, strict=True)]
        targets = {"labels": self.numbers(sequences), "firsts": torch.from_numpy(np.concatenate(places)).long()}
        return Batch(inputs, targets, tuple(map(tuple, sequences)))

    def spans(self, row: Row) -> list[Part]:
        """The words under their tags; the token of each at which its tag is predicted."""
        ids = row.parts["ids"]
        marks = np.zeros(len(ids), np.bool_)
        marks[row.parts["firsts"]] = True
        return [Part(ids, marks, title=f"tags: {' '.join(self.labels_of(row))}")]

    def scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        assert output.logits is not None
        firsts, labels = (placed(batch.targets[name], output.logits.device) for name in ("firsts", "labels"))
        return output.logits.flatten(0, 1).index_select(0, firsts).float(), labels

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """Those of every label objective, and spans (kinds, 3): predicted right, predicted, there."""
        scores, _ = self.scores(output, batch)
        kinds = kinds_of(self.labels)
        spans = torch.zeros(len(kinds), 3, dtype=torch.float64)
        chosen = iter([] if scores.is_meta else scores.argmax(dim=-1).tolist())
        for row in [] if scores.is_meta else batch.rows:
            there = set(find_spans(self.labels_of(row)))
            predicted = set(find_spans([self.labels[next(chosen)] for _ in range(row.supervised)]))
            for column, found in enumerate((predicted & there, predicted, there)):
                for kind, count in Counter(kind for kind, _, _ in found).items():
                    spans[kinds.index(kind), column] += count
        return {**super().sums(output, batch), "spans": spans}


def make(settings: TokenClassifySettings, processor: Tokenizer, facts: Mapping[str, Any]) -> TokenClassify:
    """The objective of `objective: token_classify`."""
    return make_objective_of(TokenClassify, settings, processor, facts)
