"""`format: preference`: an answer that was preferred to another, `{"prompt": ..., "chosen": ..., "rejected": ...}`.

Comes in: one row; texts or lists of messages.  Goes out: PreferenceExample.  Without a prompt of its own it is what
chosen and rejected have in common.  Texts are joined as they are; those of LLaMA-Factory's rows (instruction and input)
and Axolotl's (question) are turns, as there, and so are {from, value}.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tunekit.errors import DataError
from tunekit.formats import sharegpt
from tunekit.formats.chat import read_messages, read_tools
from tunekit.formats.example import ChatExample, CompletionExample, Example, Message
from tunekit.formats.fields import Fields, check_text, listed, read_optional_text
from tunekit.records import JsonObject

DESCRIPTION = (
    "chosen, rejected: text or messages; prompt: likewise, or what both begin with; system, tools, margin: optional"
)
PROMPTS = ("prompt", "question", "instruction", "conversations")
FIELDS = (*PROMPTS, "input", "chosen", "rejected", "system", "tools", "margin")
REQUIRED = ("chosen", "rejected")
EXAMPLE = "preference"

Turns = tuple[Message, ...]
Said = str | Turns


@dataclass(frozen=True)
class AskedExample:
    """What was asked: a text, or turns of a conversation."""

    prompt: Said
    tools: tuple[JsonObject, ...] | None = field(default=None, kw_only=True)

    def answered(self, answer: Said) -> Example:
        """The prompt with one of its answers, which alone is trained on."""
        if isinstance(self.prompt, str) and isinstance(answer, str):
            return CompletionExample(self.prompt, answer)
        asked = tuple(replace(message, weight=0.0) for message in _as_turns(self.prompt, "user"))
        return ChatExample((*asked, *_as_turns(answer, "assistant")), self.tools)


@dataclass(frozen=True)
class PreferenceExample(AskedExample):
    """The answer that was preferred, and the other one, written as the prompt is. `margin`: by how much it was."""

    chosen: Said
    rejected: Said
    margin: float = field(default=0.0, kw_only=True)


def make_example(row: Fields) -> PreferenceExample:
    """The pair of a row. A side that says nothing is empty."""
    chosen, rejected = (read_side(row, name) for name in REQUIRED)
    prompt, chosen, rejected = (
        _split(chosen, rejected) if (asked := read_prompt(row)) is None else (asked, chosen, rejected)
    )
    prompt, chosen, rejected = conversation(row, prompt, chosen, rejected)
    return PreferenceExample(prompt, chosen, rejected, tools=read_tools(row.get("tools")), margin=_read_margin(row))


def is_pair(row: Fields) -> bool:
    """Whether a row has two answers, one of which says something."""
    return all(name in row for name in REQUIRED) and any(row[name] is not None for name in REQUIRED)


def conversation(row: Fields, prompt: Said, *answers: Said) -> tuple[Said, ...]:
    """The prompt after the row's system text, then its answers: all of them texts, or all of them turns."""
    if not all(isinstance(said, str) for said in (prompt, *answers)):
        prompt, answers = _as_turns(prompt, "user"), tuple(_as_turns(answer, "assistant") for answer in answers)
    return _after(read_optional_text(row, "system"), prompt), *answers


def _read_margin(row: Fields) -> float:
    value = row.get("margin")
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"'margin' must be a number, not {str(value)[:40]!r}", "write a number, or leave it out")
    return float(value)


def read_prompt(row: Fields) -> Said | None:
    """What was asked, under whatever name; None where the row has no prompt of its own."""
    given = [name for name in PROMPTS if row.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"'{given[0]}' and '{given[1]}' are both prompts", "keep one")
    if not given:
        return None
    prompt, more = read_side(row, given[0]), read_optional_text(row, "input")
    if given[0] not in ("question", "instruction") or not isinstance(prompt, str):
        return prompt
    return (Message("user", f"{prompt}\n{more}" if more else prompt),) if prompt else ()


def _after(system: str, prompt: Said) -> Said:
    """The prompt, after the system's text where it does not begin with one."""
    if isinstance(prompt, str):
        return f"{system}\n\n{prompt}" if system else prompt
    return (Message("system", system), *prompt) if system and prompt[:1] and prompt[0].role != "system" else prompt


def read_side(row: Fields, name: str) -> Said:
    """A text, or messages; nothing said is the empty text."""
    if name not in row:
        raise DataError(f"no field '{name}'; this row has {listed(row)}", "add it, or map a column to it")
    value = row[name]
    if value is None or value == []:
        return ""
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return check_text(value, name)
    if isinstance(turns[0], Mapping) and "from" in turns[0]:
        return sharegpt.read_turns(turns, name)
    return read_messages(turns, name)


def _split(chosen: Said, rejected: Said) -> tuple[Said, Said, Said]:
    """What both begin with, and how each goes on. The space before the first difference belongs to the answers, as in
    TRL; of a conversation that has another's turns and more, the last common one does."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("'chosen' and 'rejected' must both be text or both be messages", "")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    least = min(len(chosen), len(rejected))
    shared = next((place for place, (one, other) in pairs if one != other), least)
    if isinstance(chosen, str):
        shared -= chosen[shared - 1 : shared] == " "
    elif shared == least:
        shared = max(shared - 1, 0)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _as_turns(side: Said, role: str) -> Turns:
    """Turns as they are; a text as one of this role."""
    return side if isinstance(side, tuple) else (Message(role, side),) if side else ()
