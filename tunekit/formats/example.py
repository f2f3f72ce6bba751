"""Examples: the content of a row, independent of its format.

`weight` of an example multiplies the loss of all its tokens (`sample_weight` in a row).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunekit.basics import JsonObject
from tunekit.formats.media import Media

IMAGE = "\ue004"  # stands for an image in a message's content; a private-use character
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# how a content has Mistral's parts with reasoning, which templates such as Magistral's read as parts
THINKING_TAGS = re.compile(r"\[THINK\](.*?)\[/THINK\]", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `extra`: tool_calls and all other fields. `weight` multiplies the loss of its tokens;
    with 0, the turn is only context. `images`: one for each IMAGE in the content (None: the column `images` has it);
    None in a conversation without images.
    """

    role: str
    content: str
    weight: float = 1.0
    extra: JsonObject = field(default_factory=dict)
    images: tuple[Media | None, ...] | None = None

    @property
    def empty(self) -> bool:
        """Whether the turn has no text and no tool call."""
        return not self.content.strip() and not self.extra.get("tool_calls")

    def as_dict(self) -> JsonObject:
        """The form that chat templates read. In a conversation with images, the content is a list of parts."""
        return {"role": self.role, "content": self.content if self.images is None else self._parts(), **self.extra}

    def _parts(self) -> list[JsonObject]:
        texts: list[JsonObject] = [{"type": "text", "text": text} for text in self.content.split(IMAGE)]
        parts = [part for text in texts for part in (text, {"type": "image"})][:-1]
        return [part for part in parts if part.get("text") != ""]


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


def images_of(example: object) -> list[Media]:
    """The images of a conversation, in order; empty for other examples."""
    messages = example.messages if isinstance(example, ChatExample) else ()
    return [image for message in messages for image in message.images or () if image is not None]


def with_image_folder(example: Example, folder: Path) -> Example:
    """The example. Relative paths of its images now start at `folder`."""
    if not images_of(example):
        return example
    assert isinstance(example, ChatExample)
    messages = (
        replace(message, images=tuple(image and image.located(folder) for image in message.images or ()))
        for message in example.messages
    )
    return replace(example, messages=tuple(messages))


Example = ChatExample | CompletionExample | TextExample
