"""`format: prompt_completion`: `{"prompt": ..., "completion": ...}`, two texts or two lists of messages.

Texts are not changed. Only the completion is trained on.
"""

from dataclasses import replace

from tunekit.errors import DataError
from tunekit.formats.chat import read_messages, read_tools
from tunekit.formats.example import ChatExample, CompletionExample, Example
from tunekit.formats.fields import Fields, read_text
from tunekit.formats.message_images import COLUMNS, with_images

DESCRIPTION = "prompt, completion: plain text, or lists of messages; only the completion is trained on"
FIELDS = ("prompt", "completion", "tools", "sample_weight", *COLUMNS)
REQUIRED = ("prompt", "completion")
EXAMPLE = "text"


def make_example(row: Fields) -> Example:
    """The prompt and completion of a row."""
    kinds = {isinstance(row.get(name), list) for name in ("prompt", "completion")}
    if kinds == {True}:
        prompt = tuple(replace(message, weight=0.0) for message in read_messages(row["prompt"], "prompt"))
        messages = prompt + read_messages(row["completion"], "completion")
        return ChatExample(with_images(messages, row), read_tools(row.get("tools")), prompt_turns=len(prompt))
    if kinds == {True, False}:
        what = "one of 'prompt' and 'completion' is text, and the other one is a list of messages"
        raise DataError(what, "write both as text, or both as lists of messages")
    if row.get("images"):
        what = "the row has 'images', but its prompt and completion are plain texts"
        raise DataError(what, "write lists of messages, in which images have their places")
    return CompletionExample(read_text(row, "prompt"), read_text(row, "completion"))
