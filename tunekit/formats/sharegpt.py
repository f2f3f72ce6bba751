"""`format: sharegpt`: `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}`.

The row may also have `system`, `tools` and `images`, which replace `<image>` tags in the values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.errors import DataError
from tunekit.formats.chat import read_messages, read_tools
from tunekit.formats.example import ChatExample, Example, Message
from tunekit.formats.fields import Fields, listed, named_nearly, read_json, read_optional_text, read_text
from tunekit.formats.message_images import COLUMNS, with_images

DESCRIPTION = "conversations: a list of {from: human|gpt|system, value}; system, tools and images: optional"
FIELDS = ("conversations", "system", "tools", "sample_weight", *COLUMNS)
REQUIRED = ("conversations",)
EXAMPLE = "text"

ROLES_BY_SENDER = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}


def make_example(row: Fields) -> Example:
    """The conversation of a row."""
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        state = f"a list of turns, not {type(turns).__name__}" if "conversations" in row else "present"
        state = "a list of turns, not an empty one" if turns == [] else state
        raise DataError(
            f"'conversations' must be {state}; this row has {listed(row)}",
            "map a column to conversations under data.train[].columns",
        )
    messages = read_turns(turns, "conversations")
    system = read_optional_text(row, "system")
    if system and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return ChatExample(with_images(messages, row), read_tools(row.get("tools"), messages))


def read_turns(turns: Sequence[Any], label: str) -> tuple[Message, ...]:
    """A list of {from, value}."""
    return tuple(_read_turn(turn, f"{label}[{index}]") for index, turn in enumerate(turns))


def _read_turn(turn: object, label: str) -> Message:
    if not isinstance(turn, Mapping) or "from" not in turn:
        known = listed(turn) if isinstance(turn, Mapping) else type(turn).__name__
        how = "rows with 'role' and 'content' are format: chat" if "role" in known else "write from and value"
        raise DataError(f"'{label}' has no 'from'; it has {known}", how)
    sender = turn["from"]
    if sender not in ROLES_BY_SENDER:
        how = f"{named_nearly(sender, ROLES_BY_SENDER)}known: {', '.join(ROLES_BY_SENDER)}"
        raise DataError(f"'{label}' is from the unknown sender {str(sender)[:40]!r}", how)
    value = read_text(turn, "value", where=f"{label}.")
    message = {name: part for name, part in turn.items() if name not in ("from", "value")}
    message |= {"role": ROLES_BY_SENDER[sender], "content": value}
    if sender in ("function_call", "tool_call"):
        calls = read_json(value, f"{label}.value")
        message |= {"content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return read_messages([message], label)[0]
