"""Finds the assistant's turns in a rendered conversation.

A template with {% generation %} markers marks the turns itself. Any other template renders the conversation twice per
turn: before the turn with the generation prompt, and up to the turn's end. If both texts are prefixes of the complete
text, the turn is between their ends.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunekit.contracts import Tokenizer
from tunekit.data.rendering.control import ControlTokens
from tunekit.data.rendering.reasoning import reads_parts, split_reasoning, with_parts
from tunekit.errors import DataError
from tunekit.formats.example import ChatExample, Message
from tunekit.records import JsonObject

ONLY_LAST = (
    "rows with only the last answer trained on, because the chat template rewrites earlier turns "
    "(set data.rewritten_answers: each, or data.reasoning: train, to train on all answers)"
)
TOOLS_IGNORED = "rows whose tools the chat template leaves out"
THOUGHTLESS = (
    "answers trained on without the reasoning, which the chat template leaves out (data.reasoning: train keeps it)"
)
SHORTENED = "answers that the chat template changes"
_OPENING, _CLOSING = "\ue001", "\ue002"
Tools = Sequence[JsonObject] | None  # the tools of a row
_PROBE = "\ue003tunekit\ue003"
_MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class TurnSpan:
    """The characters [start, end) of a turn to train on."""

    start: int
    end: int


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation. `neutral`: its text, with placeholders where the data spells special tokens.
    `reasoning`: the characters of the answers' reasoning, if they are known."""

    text: str
    neutral: str
    spans: tuple[TurnSpan, ...]
    weights: tuple[float, ...]  # the loss weight of each span's tokens
    empty_answers: int
    reasoning: tuple[TurnSpan, ...] = ()

    def ends_open(self, closed: Sequence[TurnSpan], last_id: int, control: ControlTokens, eos_id: int | None) -> bool:
        """Whether the text ends with a trained turn after which the template writes no control token."""
        at_end = bool(closed) and closed[-1].end == len(self.text)
        return at_end and eos_id is not None and last_id != eos_id and last_id not in control.ids


def answer_indices(messages: Sequence[Message], train_on: str) -> list[int]:
    """The indices of the turns to train on: all assistant turns, or only the last.

    Empty turns and turns that the row excludes are left out.
    """
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    chosen = answers[-1:] if train_on == "last" else answers
    return [index for index in chosen if messages[index].weight and not messages[index].empty]


def last_answer(example: ChatExample) -> int | None:
    """The index of the last assistant turn with content; None if there is none."""
    indices = [index for index in answer_indices(example.messages, "assistant") if example.messages[index].content]
    return indices[-1] if indices else None


def empty_answers(messages: Sequence[Message]) -> int:
    """The number of assistant turns without content."""
    return sum(message.role == "assistant" and message.empty for message in messages)


class TurnFinder:
    """Finds the assistant's turns for one tokenizer and template."""

    def __init__(
        self, tokenizer: Tokenizer, control: ControlTokens, template: str | None, notices: Counter[str]
    ) -> None:
        self._tokenizer, self._control, self._notices = tokenizer, control, notices
        self._template = template
        written = template if template is not None else tokenizer.chat_template or ""
        self._marked = mark_generation(written)
        self._fields = with_parts if reads_parts(written) else Message.as_dict  # the form that the template reads
        self.prompts: bool | None = None  # whether the template knows add_generation_prompt; unknown at first

    def render(self, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text."""
        return self._render(
            [self._fields(message) for message in messages], tools, add_generation_prompt, self._template
        )

    def render_neutral(self, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, with placeholders where the data spells special tokens."""
        rows = [{**self._control.neutral_fields(self._fields(message)), "role": message.role} for message in messages]
        neutral = None if tools is None else [self._control.neutral_fields(tool) for tool in tools]
        return self._render(rows, neutral, add_generation_prompt, self._template)

    def answer_header(self, messages: Sequence[Message], tools: Tools) -> str:
        """The text that a template which ignores add_generation_prompt writes before an answer to these messages; empty
        for other templates."""
        if self.prompts or not messages or messages[-1].role == "assistant":
            return ""
        bare = self.render(messages, tools)
        self.prompts = self.render(messages, tools, add_generation_prompt=True) != bare
        if self.prompts:
            return ""
        try:
            text = self.render([*messages, Message("assistant", _PROBE)], tools)
        except DataError:
            return ""
        header = text[len(bare) : max(text.find(_PROBE), 0)] if text.startswith(bare) else ""
        return header if header.strip() else ""

    def _render(
        self, rows: Sequence[JsonObject], tools: Tools, add_generation_prompt: bool, template: str | None
    ) -> str:
        return self._tokenizer.render(rows, tools=tools, add_generation_prompt=add_generation_prompt, template=template)

    def find(self, example: ChatExample, train_on: str) -> Conversation:
        """The rendered conversation with the spans of its answers. Raises: DataError if a span is not found."""
        messages, tools = example.messages, example.tools
        text = self.render(messages, tools)
        wanted = answer_indices(messages, train_on) if train_on != "all" else []
        spans = self._marked_spans(example, text, wanted)
        if spans is None:
            spans = [self._turn(messages, index, tools, text) for index in wanted]
        if None in spans:
            last = wanted[-1]
            messages = messages[: last + 1]
            text = self.render(messages, tools)
            spans, wanted = [self._turn(messages, last, tools, text)], [last]
            self._notices[ONLY_LAST] += 1
        placed = tuple(span for span in spans if span is not None)
        if len(placed) < len(spans):
            what = "the chat template changes an answer when more turns follow, so its place is unknown"
            raise DataError(what, "give a template with {% generation %} markers", key="data.chat_template")
        self.check(messages, wanted, placed, text, tools)
        neutral = self.render_neutral(messages, tools) if self.spells(messages, tools) else text
        weights = tuple(messages[index].weight for index in wanted)
        return Conversation(text, neutral, placed, weights, empty_answers(messages))

    def spells(self, messages: Sequence[Message], tools: Tools) -> bool:
        """Whether the data spells a special token."""
        rows = [self._fields(message) for message in messages]
        return self._control.spelled_in(rows) or self._control.spelled_in(tools)

    def rewrites(self, example: ChatExample, wanted: Sequence[int]) -> bool:
        """Whether the template writes an answer differently when later turns follow it."""
        text = self.render(example.messages, example.tools)
        return any(self._turn(example.messages, index, example.tools, text) is None for index in wanted)

    def _marked_spans(self, example: ChatExample, text: str, wanted: Sequence[int]) -> list[TurnSpan | None] | None:
        """The spans that the template's {% generation %} blocks mark; None unless every answer is marked."""
        if self._marked is None or not wanted:
            return None
        rows = [self._fields(message) for message in example.messages]
        parts = re.split(f"([{_OPENING}{_CLOSING}])", self._render(rows, example.tools, False, self._marked))
        spans, position, opened = [], 0, 0
        for part in parts:
            if part == _OPENING:
                opened = position
            elif part == _CLOSING:
                spans.append(TurnSpan(opened, position))
            else:
                position += len(part)
        answers = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
        if position != len(text) or len(spans) != len(answers):
            return None
        return [span for index, span in zip(answers, spans, strict=True) if index in wanted]

    def _turn(self, messages: Sequence[Message], index: int, tools: Tools, text: str) -> TurnSpan | None:
        """The span of one turn; None if the text rendered up to this turn is not a prefix of the complete text."""
        complete = index + 1 == len(messages)
        try:
            upto = text if complete else self.render(messages[: index + 1], tools)
        except DataError:
            return None
        if not text.startswith(upto):
            upto = self._control.without_last(upto)  # this token can end the whole conversation, as in Phi-3
        if not text.startswith(upto):
            return None
        start = self.answer_start(messages, index, tools, upto)
        return None if start is None else TurnSpan(start, len(upto))

    def answer_start(self, messages: Sequence[Message], index: int, tools: Tools, upto: str) -> int | None:
        """Where turn `index` begins in `upto`, the text up to its end, after the template's generation prompt. None if
        it is not found."""
        try:
            before = self.render(messages[:index], tools, add_generation_prompt=True)
            bare = self.render(messages[:index], tools) if self.prompts is not True else None
        except DataError:
            if index:
                return None
            before = bare = ""  # many templates refuse to render an empty conversation
        if bare is not None and index:
            self.prompts = before != bare
        if before != bare and upto.startswith(before):
            return len(before)
        bare = self.render(messages[:index], tools) if bare is None else bare
        if not upto.startswith(bare):
            return None
        place = self._content_place(messages[: index + 1], tools, upto)
        return self._after_header(place, upto, len(bare), before)

    def _content_place(self, messages: Sequence[Message], tools: Tools, upto: str) -> int:
        """The position of the last message's content, or of its reasoning before the content; -1 if it is not found.

        The conversation is rendered with a probe text in place of them, and the probe is searched for.
        """
        last, content = messages[-1], messages[-1].content
        bare = split_reasoning(last).message
        try:
            text = self.render([*messages[:-1], replace(bare, content=_PROBE)], tools)
            if bare.extra != last.extra and upto.startswith(header := text.partition(_PROBE)[0]) and header != text:
                return len(header)
            place = self.render([*messages[:-1], replace(last, content=_PROBE)], tools).find(_PROBE)
        except DataError:
            return -1
        there = place >= 0 and (upto.startswith(content, place) or upto.startswith(content.strip(), place))
        return place if there else -1

    def _after_header(self, place: int, upto: str, bare: int, before: str) -> int:
        """The start of an answer whose header ("<|im_start|>assistant") differs from the generation prompt."""
        if len(before) > bare:
            shared = common_prefix(before, upto)
            return min(shared, place) if place >= 0 else shared
        return place if place >= 0 and upto[bare:place].strip() else bare

    def check(
        self, messages: Sequence[Message], wanted: Sequence[int], spans: Sequence[TurnSpan], text: str, tools: Tools
    ) -> None:
        """Check that the template writes all content of the row. Omitted content is counted in the notices.

        Raises: DataError if the template leaves out tool calls.
        """
        for index, span in zip(wanted, spans, strict=True):
            turn = text[span.start : span.end]
            self.check_calls(messages[index], turn)
            answer = split_reasoning(messages[index])
            if answer.message.content.strip() not in turn:
                self._notices[SHORTENED] += 1
            if answer.reasoning.strip() not in turn:
                self._notices[THOUGHTLESS] += 1
        names = [(tool.get("function") or tool).get("name") for tool in tools or ()]
        if names and not any(str(name) in text for name in names):
            self._notices[TOOLS_IGNORED] += 1

    def check_calls(self, message: Message, text: str) -> None:
        """Raises: DataError if the text lacks a tool call of the message."""
        for call in message.extra.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                what = "the chat template leaves out tool calls"
                raise DataError(what, "give a template that writes them", key="data.chat_template")

    def close(self, span: TurnSpan, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> TurnSpan:
        """The span, extended to its end-of-turn token, without the whitespace that the template writes after the token.

        If a turn has no such token, as in GLM-4's template, the control token that opens the next turn ends it.
        """
        first = bisect_right([end for _, end in offsets], span.start)
        stop = bisect_left([start for start, _ in offsets], span.end)
        for token in range(stop - 1, first - 1, -1):
            start, end = offsets[token]
            if ids[token] in self._control.ids or ids[token] == self._tokenizer.eos_id:
                return TurnSpan(span.start, end)
            if text[start:end].strip():
                break
        if stop < len(ids) and ids[stop] in self._control.ids and offsets[stop][0] == span.end:
            return TurnSpan(span.start, offsets[stop][1])
        return span


def common_prefix(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (first, second) in pairs if first != second), min(len(one), len(other)))


def mark_generation(template: str) -> str | None:
    """The template with visible marks in place of its {% generation %} blocks; None if it has no such blocks."""
    if not _MARKER.search(template):
        return None

    def visible_mark(match: re.Match[str]) -> str:
        left, ending, right = match.groups()
        mark = _CLOSING if ending else _OPENING
        # A block, not an expression, so that the whitespace around it is trimmed just as around the original.
        return f"{{%{left} if true %}}{{{{ '{mark}' }}}}{{% endif {right}%}}"

    return _MARKER.sub(visible_mark, template)
