"""Examples: the content of a row, independent of its format.

`weight` of an example multiplies the loss of all its tokens (`sample_weight` in a row).
"""

import re
from dataclasses import dataclass, field

from tunekit.basics import JsonObject

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# how a content has Mistral's parts with reasoning, which templates such as Magistral's read as parts
THINKING_TAGS = re.compile(r"\[THINK\](.*?)\[/THINK\]", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `extra`: tool_calls and all other fields. `weight` multiplies the loss of its tokens;
    with 0, the turn is only context.
    """

    role: str
    content: str
    weight: float = 1.0
    extra: JsonObject = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether the turn has no text and no tool call."""
        return not self.content.strip() and not self.extra.get("tool_calls")

    def as_dict(self) -> JsonObject:
        """The form that chat templates read."""
        return {"role": self.role, "content": self.content, **self.extra}


def question_turns(text: str, system: str | None = None) -> tuple[Message, ...]:
    """A user's turn, after an optional system message."""
    return (*([] if system is None else [Message("system", system)]), Message("user", text))


@dataclass(frozen=True)
class CompletionExample:
    """A prompt and its completion, joined without changes."""

    prompt: str
    completion: str
    weight: float = 1.0


@dataclass(frozen=True)
class TextExample:
    """Running text. All of its tokens are trained on."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class ChatExample:
    """A conversation. `without_template`: the example to use with a tokenizer without a chat template, or None.
    `prompt_turns`: the number of first turns that are the prompt, so that their weight is 0 in every row."""

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] | None = None
    without_template: CompletionExample | None = None
    weight: float = 1.0
    prompt_turns: int = 0


Example = ChatExample | CompletionExample | TextExample
