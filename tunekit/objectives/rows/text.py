"""The base class of rows of token ids, and functions to answer by generating text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from tunekit.contracts import Answering, AnswerLimits, EncodeOptions, Model, Row, RowKind, Tokenizer
from tunekit.data.rendering.render import Renderer
from tunekit.model.loaded_model import as_loaded
from tunekit.model.text.generation import generate_texts


@dataclass(frozen=True, eq=False)
class TextRows(RowKind):
    """Rows whose prompts are rendered by the chat template, or by the data format if there is no template."""

    tokenizer: Tokenizer
    fingerprint: str
    options: EncodeOptions = field(default_factory=EncodeOptions)
    notices: Counter[str] = field(default_factory=Counter)

    @property
    def unknown_id(self) -> int | None:
        """The id of the tokenizer's unknown token."""
        return self.tokenizer.unknown_id

    @cached_property
    def renderer(self) -> Renderer:
        """The renderer of examples. Its notices are counted in `notices` of these rows."""
        options = self.options
        return Renderer(self.tokenizer, options.train_on, options.template, self.notices, options.reasoning)

    def prompt(self, example: Any) -> tuple[list[int], str] | None:
        """The ids before the last answer (generation continues from them), and the answer's text. None for running
        text, which has no prompt."""
        return self.renderer.prompt(example)

    def reasoning_left_out(self, example: Any) -> list[int]:
        return self.renderer.reasoning_left_out(example)

    def question(self, text: str, system: str | None = None) -> list[int]:
        """The ids of the text. If there is a chat template, it is rendered as a user's turn after an optional system
        message; otherwise it is a text to continue."""
        return self.renderer.question(text, system)

    def readable(self, prompt: Sequence[int]) -> str:
        """The text of the ids."""
        return self.tokenizer.decode(prompt)


def text_answering(tokenizer: Tokenizer) -> Answering:
    """The Answering of models that generate text, whose answers continue their prompts."""
    return Answering("text", write=partial(_continuations, tokenizer))


def _continuations(
    tokenizer: Tokenizer, model: Model, prompts: Sequence[Sequence[int]], limits: AnswerLimits
) -> list[str]:
    ids_of_answers = generate_texts(
        as_loaded(model.base),
        tokenizer,
        prompts,
        max_new_tokens=limits.max_new_tokens,
        batch_size=limits.batch_size,
        adapt=model.adapt_inputs,
        virtual_tokens=model.virtual_tokens,
        template=limits.template,
        sampling=limits.sampling,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in ids_of_answers]


def put_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before a complete text, and the special tokens after the text."""
    inner, whole = tokenizer.encode("a"), tokenizer.encode_source("a")
    starts = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner]
    return (whole[: starts[0]], whole[starts[0] + len(inner) :]) if inner and starts else ([], [])


def padding_id(tokenizer: Tokenizer) -> int:
    """The padding id. It differs from the ids at the end of a text, because the heads of T5 and BART search for those
    end ids. Padding is masked."""
    ends = put_around(tokenizer)[1]
    ids: tuple[int, ...] = (tokenizer.pad_id, *range(len(ends) + 1))
    return next(each for each in ids if each not in ends)


def as_source(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids, with the special tokens that the tokenizer puts before and after a text. Tokens that are already there
    are not added again."""
    before, after = put_around(tokenizer)
    before = [] if ids[: len(before)] == before else before  # a template may already have written these tokens
    after = [] if ids[len(ids) - len(after) :] == after else after
    return [*before, *ids, *after]


def fill_with(rows: Iterator[Row], size: int, kind: RowKind) -> list[Row]:
    """Rows whose sizes sum to `size`; the last row is cut."""
    filled: list[Row] = []
    while size:
        row = next(rows)
        filled.append(kind.cut(row, 0, min(size, row.size)))
        size -= filled[-1].size
    return filled
