"""Examples: what a row means, whatever format it was written in.

Comes in: formats/*.py turn rows into these.  Goes out: plain frozen values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Message:
    """One turn; `extra` holds tool_calls and whatever else it has. `trained` is false where the row says so."""

    role: str
    content: str
    trained: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Nothing was said and no tool called."""
        return not self.content.strip() and not self.extra.get("tool_calls")

    def as_dict(self) -> dict[str, Any]:
        """As a chat template reads it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class CompletionExample:
    """A prompt and its completion, joined as they are."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TextExample:
    """Running text, trained on whole."""

    text: str


@dataclass(frozen=True)
class ChatExample:
    """A conversation. `without_template` is what to train on where the tokenizer has no chat template, if anything."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    without_template: CompletionExample | None = None


Example = ChatExample | CompletionExample | TextExample
