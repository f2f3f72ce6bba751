"""Conversations that keep all reasoning: every answer is written as the chat template writes it in the last turn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tunekit.data.rendering.control import ControlTokens
from tunekit.data.rendering.reasoning import SplitAnswer, end_of_reasoning, split_reasoning
from tunekit.data.rendering.turns import (
    Conversation,
    Tools,
    TurnFinder,
    TurnSpan,
    answer_indices,
    empty_answers,
)
from tunekit.errors import DataError
from tunekit.formats.example import ChatExample, Message

_PROBE = "\ue003tunekit\ue003"


@dataclass(frozen=True)
class _Lead:
    """The text between the content of the turn before an answer and the answer's content (or its first tool call).

    [start, stop) is this text in the complete conversation; it is replaced by text[first:last] of `text`, the
    conversation up to this answer. The answer begins at `answer`, its reasoning ends at `thought`, and `rest`
    characters after the lead belong to it. The reasoning is put in at `block`, if the template does not write it."""

    index: int
    start: int
    stop: int
    text: str
    first: int
    last: int
    answer: int
    thought: int
    rest: int
    block: int

    @property
    def growth(self) -> int:
        """By how many characters the complete text becomes longer."""
        return self.last - self.first - (self.stop - self.start)


class KeptReasoning:
    """Finds the turns of conversations that keep their reasoning. `template`: the chat template's text."""

    def __init__(self, turns: TurnFinder, control: ControlTokens, template: str) -> None:
        self._turns, self._control, self._template = turns, control, template

    def find(self, example: ChatExample, train_on: str) -> Conversation:
        """The rendered conversation, with the spans of its answers and of their reasoning.

        Raises: DataError if the template moves an answer when more turns follow.
        """
        answers, tools = [split_reasoning(message) for message in example.messages], example.tools
        messages = [answer.rendered(self._template) for answer in answers]
        text = self._turns.render(messages, tools)
        for message in messages:
            self._turns.check_calls(message, text)
        places = [at for at, each in enumerate(messages) if each.role == "assistant" and not each.empty]
        leads = [self._lead(messages, at, answers[at], tools, text) for at in places]
        joined = _joined(text, leads, [lead.text for lead in leads])
        grown = [0, *accumulate(lead.growth for lead in leads)]
        spans, reasoning = dict[int, TurnSpan](), list[TurnSpan]()
        for lead, before, after in zip(leads, grown[:-1], grown[1:], strict=True):
            moved = lead.start + before - lead.first
            spans[lead.index] = TurnSpan(lead.answer + moved, lead.stop + after + lead.rest)
            reasoning.append(TurnSpan(lead.answer + moved, lead.thought + moved))
        wanted = answer_indices(messages, train_on) if train_on != "all" else []
        placed = tuple(spans[at] for at in wanted)
        self._turns.check(messages, wanted, placed, joined, tools)
        neutral = joined
        if self._turns.spells(example.messages, tools):
            alone = [self._neutral(messages[: lead.index + 1], answers[lead.index], tools, lead) for lead in leads]
            neutral = _joined(self._turns.render_neutral(messages, tools), leads, alone)
        weights = tuple(messages[at].weight for at in wanted)
        return Conversation(joined, neutral, placed, weights, empty_answers(messages), tuple(reasoning))

    def _lead(self, messages: Sequence[Message], index: int, answer: SplitAnswer, tools: Tools, text: str) -> _Lead:
        upto = messages[: index + 1]
        alone = self._turns.render(upto, tools)
        start, stop = self._place(messages, index - 1, tools, text), self._place(messages, index, tools, text)
        first, last = self._place(upto, index - 1, tools, alone), self._place(upto, index, tools, alone)
        answer_start = self._answer_start(messages, index, tools, alone, (first, last))
        endings = [alone[last:], self._control.without_last(alone[last:])]
        after = next((len(each) for each in endings if text.startswith(each, stop)), -1)
        if min(start, stop, first, last, after) < 0 or answer_start is None:
            what = "the chat template moves an answer when more turns follow, so its reasoning cannot be kept"
            raise DataError(what, "set data.reasoning: template, or another data.chat_template", key="data.reasoning")
        place = last
        if answer.reasoning.strip() not in alone[answer_start:last]:
            if answer.field(self._template):
                what = f"the chat template reads '{answer.field(self._template)}', but leaves it out of this answer"
                raise DataError(what, "set data.reasoning: drop, or another data.chat_template", key="data.reasoning")
            # Before the content; before the whole answer if it is a tool call, whose name is inside the call.
            place = last if answer.message.content else answer_start
            alone, last = alone[:place] + answer.block + alone[place:], last + len(answer.block)
            answer_start = self._answer_start(messages, index, tools, alone, (first, last))  # a prompt can open it
            assert answer_start is not None
        thought = end_of_reasoning(alone, answer.reasoning, answer_start, last)
        return _Lead(index, start, stop, alone, first, last, answer_start, thought, after, place)

    def _answer_start(
        self, messages: Sequence[Message], index: int, tools: Tools, alone: str, lead: tuple[int, int]
    ) -> int | None:
        """Where the answer begins. Some templates leave out earlier reasoning once this answer follows (gpt-oss after a
        tool call); then the answer begins after the generation prompt in [first, last)."""
        start = self._turns.answer_start(messages, index, tools, alone)
        if start is not None:
            return start
        bare = self._turns.render(messages[:index], tools)
        header = self._turns.render(messages[:index], tools, add_generation_prompt=True).removeprefix(bare)
        place = alone.find(header, *lead) if header else -1
        return place + len(header) if place >= 0 else None

    def _neutral(self, upto: Sequence[Message], answer: SplitAnswer, tools: Tools, lead: _Lead) -> str:
        """The lead's text, with placeholders where the data spells special tokens."""
        alone = self._turns.render_neutral(upto, tools)
        if len(alone) == len(lead.text):
            return alone
        block = answer.block.replace(answer.reasoning, str(self._control.neutralized(answer.reasoning)))
        return alone[: lead.block] + block + alone[lead.block :]

    def _place(self, messages: Sequence[Message], index: int, tools: Tools, text: str) -> int:
        """Where the content of a turn begins in the text, or its first tool call's name if it has no content; -1 if it
        is not found. The start of the text for the turn before the first."""
        if index < 0:
            return 0
        message = messages[index]
        if message.content or not message.extra.get("tool_calls"):
            probe = replace(message, content=_PROBE)
        else:
            first, *others = message.extra["tool_calls"]
            first = {**first, "function": {**first["function"], "name": _PROBE}}
            probe = replace(message, extra={**message.extra, "tool_calls": [first, *others]})
        probed = self._turns.render([*messages[:index], probe, *messages[index + 1 :]], tools)
        place = probed.find(_PROBE)
        return place if place >= 0 and text.startswith(probed[:place]) else -1


def _joined(text: str, leads: Sequence[_Lead], texts: Sequence[str]) -> str:
    """The complete text with all leads replaced. `texts`: the text that each lead comes from."""
    pieces, position = [], 0
    for lead, alone in zip(leads, texts, strict=True):
        pieces += [text[position : lead.start], alone[lead.first : lead.last]]
        position = lead.stop
    return "".join([*pieces, text[position:]])
