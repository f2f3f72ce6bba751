"""The reasoning in the answers of a conversation, which `data.reasoning` keeps, masks or drops."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunekit.basics import JsonObject
from tunekit.formats.example import THINKING_TAGS, Message

# names of the field with the reasoning, in different models
REASONING = ("reasoning_content", "thinking", "reasoning", "tool_plan")
# reasoning at the start of a content; models whose prompt ends with <think> write only the closing tag
_INLINE = re.compile(rf"\A(?:\s*{THINKING_TAGS.pattern}|(?:\s*<think>)?(.*?)</think>)\s*", re.DOTALL)
_KINDS = ("text", "thinking")  # of the pieces of a content that is split at [THINK] tags, alternating
_CLOSING = re.compile(r"\s*(?:<[^<>]*>|\[[^\[\]]*\])\s*")  # a tag, with the whitespace around it


@dataclass(frozen=True)
class SplitAnswer:
    """An assistant turn, split: `message` without reasoning, the reasoning's text, and `block`: the reasoning as it is
    written before the content if the template has no field for it. Both texts are empty if there is no reasoning."""

    message: Message
    reasoning: str
    block: str

    def rendered(self, template: str) -> Message:
        """The message for the template: with the reasoning in a field that the template reads, else without it."""
        name = self.field(template)
        return replace(self.message, extra={**self.message.extra, name: self.reasoning}) if name else self.message

    def written(self, template: str) -> Message:
        """The message with its reasoning: in a field that the template reads, or else in its content."""
        inline = replace(self.message, content=self.block + self.message.content)
        return self.rendered(template) if self.field(template) else inline

    def field(self, template: str) -> str | None:
        """The first field for reasoning that the template reads; None without reasoning, or if there is none."""
        return next((name for name in REASONING if self.reasoning and reads_field(template, name)), None)


def split_reasoning(message: Message) -> SplitAnswer:
    """The turn, split from its reasoning: a field of the message, or <think> or [THINK] tags before its content."""
    if message.role != "assistant":
        return SplitAnswer(message, "", "")
    inline = _INLINE.match(message.content)
    fields = [text for name in REASONING if isinstance(text := message.extra.get(name), str) and text.strip()]
    extra = {name: value for name, value in message.extra.items() if name not in REASONING}
    reasoning = fields[0] if fields else "" if inline is None else (inline[1] or inline[2] or "").strip("\n")
    if not reasoning.strip():
        return SplitAnswer(replace(message, extra=extra), "", "")
    content = message.content if inline is None else message.content[inline.end() :]
    block = f"<think>\n{reasoning}\n</think>\n\n" if fields or inline is None else inline[0]
    block = f"<think>\n{block}" if "</think>" in block and "<think>" not in block else block
    return SplitAnswer(replace(message, content=content, extra=extra), reasoning, block)


def without_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, without the reasoning of the answers."""
    answers = [split_reasoning(message).message for message in messages]
    bare = [_INLINE.sub("", each.content, count=1) if each.role == "assistant" else each.content for each in answers]
    return tuple(replace(each, content=content) for each, content in zip(answers, bare, strict=True))


def end_of_reasoning(text: str, reasoning: str, start: int, stop: int) -> int:
    """Where reasoning that is in text[start:stop] ends, with its closing tag; `start` if it is not there."""
    place = text.rfind(reasoning.strip(), start, stop) if reasoning.strip() else -1
    if place < 0:
        return start
    end = place + len(reasoning.strip())
    closing = _CLOSING.match(text, end, stop)
    return end if closing is None else closing.end()


def reads_field(template: str, name: str) -> bool:
    """Whether a template reads a field of a message, as `message.name`, `message['name']` or `'name' in message`."""
    return re.search(rf"[.'\"]{re.escape(name)}\b", template) is not None


def reads_parts(template: str) -> bool:
    """Whether a template reads reasoning from parts of the content, `{"type": "thinking", "thinking": ...}`."""
    return re.search(r"type['\"]?\]?\s*==\s*['\"]thinking['\"]", template) is not None


def with_parts(message: Message) -> JsonObject:
    """A message for a template that reads reasoning from parts: the field `thinking`, and the texts in [THINK] tags of
    answers and system messages, become parts of its content. These tags are then control tokens, not spelled text."""
    pieces = THINKING_TAGS.split(message.content) if message.role in ("assistant", "system") else [message.content]
    parts = [{"type": (kind := _KINDS[at % 2]), kind: piece} for at, piece in enumerate(pieces) if piece]
    extra = {name: value for name, value in message.extra.items() if name != "thinking"}
    if thinking := message.extra.get("thinking"):
        parts = [{"type": "thinking", "thinking": thinking}, *parts]
    elif len(pieces) == 1:
        return message.as_dict()
    return {"role": message.role, "content": parts, **extra}
