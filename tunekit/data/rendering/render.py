"""Example to ids and a mask: which tokens are trained on is known from message spans, never from searching ids.

Comes in: an Example, a Tokenizer.  Goes out: EncodedRow, or the reason why there is none.  Next: rows.py.
A conversation is rendered whole, once more up to each assistant turn (turns.py finds the spans), and tokenized with
offsets.  Text of the data that spells a special token stays text: only the template makes control tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tunekit.contracts import EncodedRow, Tokenizer
from tunekit.data.rendering.control import ControlTokens, encode_trusted
from tunekit.data.rendering.turns import Span, TurnFinder, answer_indices, last_answer
from tunekit.errors import DataError
from tunekit.formats.example import ChatExample, CompletionExample, Example, TextExample

Mask = NDArray[np.bool_]  # (T,)

EMPTY_ANSWER = "empty answer"
EMPTY_TEXT = "empty text"
EMPTY_SOURCE = "empty prompt, which leaves the encoder nothing to read"
NO_ANSWER = "no answer to train on"
NO_TEMPLATE = "rows written as plain prompt and answer: the tokenizer has no chat template"
EOS_ADDED = "rows whose last turn the chat template does not end; the end-of-sequence token was added"
ONLY_LAST_ANSWER = "conversations with earlier answers: the encoder reads them, and the last is trained on"
MERGED_BOUNDARY = "rows whose first answer token holds the prompt's last characters too; it is trained on"


class Dropped(Exception):
    """A row that cannot be trained on, and is counted under this reason."""


@dataclass
class Renderer:
    """Renders examples for one tokenizer, one template and one `train_on`; counts what the user should know."""

    tokenizer: Tokenizer
    train_on: str
    template: str | None = None
    notices: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._control = ControlTokens(self.tokenizer)
        self._turns = TurnFinder(self.tokenizer, self._control, self.template, self.notices)

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self.template is not None or self.tokenizer.chat_template is not None

    @property
    def learned(self) -> bool | None:
        """What the rows so far have told of the template; see TurnFinder.prompts."""
        return self._turns.prompts

    def encode(self, example: Example, origin: str) -> EncodedRow:
        """The row. Raises: Dropped where nothing can be trained on; DataError where the row is wrong."""
        if self.tokenizer.answer_start_id is not None:
            return self._encode_pair(example, origin, self.tokenizer.answer_start_id)
        if isinstance(example, ChatExample):
            plain = example.without_template
            if self.has_template or plain is None:
                return self._encode_chat(example, origin)
            self.notices[NO_TEMPLATE] += 1
            example = plain
        if isinstance(example, CompletionExample):
            return self._encode_completion(example, origin)
        return self._encode_text(example, origin)

    def prompt(self, example: Example) -> tuple[list[int], str] | None:
        """Ids up to the last answer, as generation starts from them, and the answer's text; None for running text.

        Of an encoder-decoder: what its encoder reads.
        """
        if isinstance(example, ChatExample):
            if self.has_template or example.without_template is None:
                return self._chat_prompt(example)
            example = example.without_template
        if isinstance(example, TextExample) or not example.completion:
            return None
        if self.tokenizer.answer_start_id is not None:
            return self.tokenizer.encode_source(example.prompt), example.completion
        return self._begin() + self.tokenizer.encode(example.prompt), example.completion

    def _begin(self) -> list[int]:
        """The beginning-of-sequence token where this tokenizer puts it before text."""
        return [self.tokenizer.bos_id] if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None else []

    def _chat_prompt(self, example: ChatExample) -> tuple[list[int], str] | None:
        index = last_answer(example)
        if index is None:
            return None
        self._need_template()
        text = self._turns.render(example.messages[:index], example.tools, add_generation_prompt=True)
        neutral = self._turns.render_neutral(example.messages[:index], example.tools, add_generation_prompt=True)
        ids, _ = encode_trusted(text, neutral, self.tokenizer, self._control)
        return self._as_source(ids), example.messages[index].content

    def _as_source(self, ids: list[int]) -> list[int]:
        """The same, for an encoder with the special tokens around them that the tokenizer puts around a text."""
        if self.tokenizer.answer_start_id is None:
            return ids
        inner, whole = self.tokenizer.encode("a"), self.tokenizer.encode_source("a")
        starts = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner]
        if not inner or not starts:
            return ids
        before, after = whole[: starts[0]], whole[starts[0] + len(inner) :]
        before = [] if ids[: len(before)] == before else before  # the template may write them itself
        after = [] if ids[len(ids) - len(after) :] == after else after
        return [*before, *ids, *after]

    def _need_template(self) -> None:
        if not self.has_template:
            raise DataError(
                "a conversation, but the tokenizer has no chat template",
                "name a Jinja file",
                key="data.chat_template",
            )

    def _encode_pair(self, example: Example, origin: str, start_id: int) -> EncodedRow:
        """Source, the token with which answers begin, and the answer with the tokenizer's own end: all of it learnt."""
        if isinstance(example, TextExample):
            raise DataError("running text has no source for the encoder to read", "give a prompt and its completion")
        if isinstance(example, ChatExample):
            if not self.has_template and example.without_template is not None:
                self.notices[NO_TEMPLATE] += 1
            self.notices[ONLY_LAST_ANSWER] += len(answer_indices(example.messages, self.train_on)) > 1
        found = self.prompt(example)
        if found is None:
            raise Dropped(EMPTY_ANSWER if isinstance(example, CompletionExample) else NO_ANSWER)
        source, answer = found[0], self.tokenizer.encode_answer(found[1])
        if not source:
            raise Dropped(EMPTY_SOURCE)
        eos = self.tokenizer.eos_id
        answer = answer if eos is None or answer[-1:] == [eos] else [*answer, eos]
        trained = np.arange(len(source) + 1 + len(answer)) > len(source)  # (T,)
        return make_row([*source, start_id, *answer], trained, origin)

    def _encode_chat(self, example: ChatExample, origin: str) -> EncodedRow:
        self._need_template()
        conversation = self._turns.find(example, self.train_on)
        if not conversation.spans and self.train_on != "all":
            raise Dropped(EMPTY_ANSWER if conversation.empty_answers else NO_ANSWER)
        text = conversation.text
        ids, offsets = encode_trusted(text, conversation.neutral, self.tokenizer, self._control)
        if self.train_on == "all":
            return make_row(ids, np.ones(len(ids), dtype=np.bool_), origin)
        spans = [self._turns.close(span, text, ids, offsets) for span in conversation.spans]
        trained = mark_spans(offsets, spans)  # (T,)
        eos = self.tokenizer.eos_id
        if eos is not None and conversation.ends_open(spans, ids[-1], self._control, eos):
            self.notices[EOS_ADDED] += 1
            ids, trained = [*ids, eos], np.append(trained, True)
        return make_row(ids, trained, origin)

    def _encode_completion(self, example: CompletionExample, origin: str) -> EncodedRow:
        if not example.completion:
            raise Dropped(EMPTY_ANSWER)
        ids, offsets = self.tokenizer.encode_with_offsets(example.prompt + example.completion)
        start = len(example.prompt)
        filled = fill_gaps(offsets)
        if self.train_on == "all":
            trained = np.ones(len(ids), dtype=np.bool_)  # (T,)
        else:
            trained = mark_spans(filled, [Span(start, start + len(example.completion))])
            if any(first < start < end for first, end in filled):
                self.notices[MERGED_BOUNDARY] += 1
        return self._finish_plain(ids, trained, origin)

    def _encode_text(self, example: TextExample, origin: str) -> EncodedRow:
        if not example.text:
            raise Dropped(EMPTY_TEXT)
        ids = self.tokenizer.encode(example.text)
        return self._finish_plain(ids, np.ones(len(ids), dtype=np.bool_), origin)

    def _finish_plain(self, ids: list[int], trained: Mask, origin: str) -> EncodedRow:
        """Put BOS before where the tokenizer does, and a trained EOS after; neither where the text has it already."""
        begin, eos = self._begin(), self.tokenizer.eos_id
        if begin and ids[:1] != begin:
            ids, trained = begin + ids, np.insert(trained, 0, False)
        if eos is not None and ids[-1:] != [eos]:
            ids, trained = [*ids, eos], np.append(trained, True)
        return make_row(ids, trained, origin)


def encode_example(
    example: Example, tokenizer: Tokenizer, train_on: str = "assistant", template: str | None = None, origin: str = ""
) -> EncodedRow:
    """One example, encoded. For many, keep a Renderer."""
    return Renderer(tokenizer, train_on, template).encode(example, origin)


def make_row(ids: Sequence[int], trained: Mask, origin: str) -> EncodedRow:
    """An EncodedRow from lists."""
    return EncodedRow(np.asarray(ids, dtype=np.int32), trained.astype(np.bool_), origin)


def fill_gaps(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets that cover the text: some tokenizers leave a token's own leading spaces out of its offsets."""
    filled: list[tuple[int, int]] = []
    last = 0
    for start, end in offsets:
        filled.append((min(start, last), max(end, last)) if start >= last else (start, end))
        last = max(last, end)
    return filled


def mark_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> Mask:
    """(T,) true for every token that holds a character of a span; spans are in order and apart."""
    marks = np.zeros(len(offsets), dtype=np.bool_)  # (T,)
    starts = np.array([start for start, _ in offsets], dtype=np.int64)  # (T,)
    ends = np.array([end for _, end in offsets], dtype=np.int64)  # (T,)
    for span in spans:
        inside = (ends > span.start) & (starts < span.end)
        empty = (ends == starts) & (starts >= span.start) & (starts < span.end)
        marks |= inside | empty
    return marks
