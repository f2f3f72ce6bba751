"""Examples: what a row means, whatever format it was written in.

Comes in: formats/*.py turn rows into these.  Goes out: plain frozen values. An example's own `weight` multiplies the
loss of all its tokens (`sample_weight` in a row).
"""

from dataclasses import dataclass, field

from tunekit.records import JsonObject

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Message:
    """One turn; `extra` holds tool_calls and whatever else it has. `weight`: of the loss of its tokens; 0 keeps the
    turn as context."""

    role: str
    content: str
    weight: float = 1.0
    extra: JsonObject = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Nothing was said and no tool called."""
        return not self.content.strip() and not self.extra.get("tool_calls")

    def as_dict(self) -> JsonObject:
        """As a chat template reads it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class CompletionExample:
    """A prompt and its completion, joined as they are."""

    prompt: str
    completion: str
    weight: float = 1.0


@dataclass(frozen=True)
class TextExample:
    """Running text, trained on whole."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class ChatExample:
    """A conversation. `without_template` is what to train on where the tokenizer has no chat template, if anything."""

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] | None = None
    without_template: CompletionExample | None = None
    weight: float = 1.0


Example = ChatExample | CompletionExample | TextExample
