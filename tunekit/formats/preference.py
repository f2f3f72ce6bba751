"""`format: preference`: a chosen and a rejected answer, `{"prompt": ..., "chosen": ..., "rejected": ...}`.

All fields are texts or lists of messages. If the row has no prompt, or if both answers are conversations that contain
it, the common beginning of both answers is the prompt. Texts are joined without changes. Rows of LLaMA-Factory
(instruction and input), rows of Axolotl (question) and messages {from, value} become turns, as in those tools.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tunekit.basics import JsonObject
from tunekit.errors import DataError
from tunekit.formats import sharegpt
from tunekit.formats.chat import read_messages, read_tools
from tunekit.formats.example import ChatExample, CompletionExample, Example, Message
from tunekit.formats.fields import Fields, check_text, listed, read_optional_text

DESCRIPTION = (
    "chosen, rejected: text or messages; prompt: text or messages, by default the common beginning of both answers; "
    "system, tools, margin: optional"
)
PROMPTS = ("prompt", "question", "instruction", "conversations")
FIELDS = (*PROMPTS, "input", "chosen", "rejected", "system", "tools", "margin")
REQUIRED = ("chosen", "rejected")
EXAMPLE = "preference"
ASKING = ("system", "developer", "user")  # roles of a prompt's turns

Turns = tuple[Message, ...]
TextOrTurns = str | Turns


@dataclass(frozen=True)
class PromptedExample:
    """A prompt, either as a text or as turns of a conversation."""

    prompt: TextOrTurns
    tools: tuple[JsonObject, ...] | None = field(default=None, kw_only=True)

    def answered(self, answer: TextOrTurns) -> Example:
        """The prompt with one of its answers. Only the answer is trained on."""
        if isinstance(self.prompt, str) and isinstance(answer, str):
            return CompletionExample(self.prompt, answer)
        asked = tuple(replace(message, weight=0.0) for message in _as_turns(self.prompt, "user"))
        return ChatExample((*asked, *_as_turns(answer, "assistant")), self.tools)


@dataclass(frozen=True)
class PreferenceExample(PromptedExample):
    """A prompt with a chosen and a rejected answer; all three are texts, or all three are turns. `margin`: how much
    better the chosen answer is."""

    chosen: TextOrTurns
    rejected: TextOrTurns
    margin: float = field(default=0.0, kw_only=True)


def make_example(row: Fields) -> PreferenceExample:
    """The preference pair of a row. A missing answer is the empty text."""
    chosen, rejected = (read_side(row, name) for name in REQUIRED)
    prompt = prompt_before(row, chosen, rejected)
    if prompt is None:
        prompt = common_beginning(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    prompt, chosen, rejected = conversation(row, prompt, chosen, rejected)
    return PreferenceExample(prompt, chosen, rejected, tools=read_tools(row.get("tools")), margin=_read_margin(row))


def is_pair(row: Fields) -> bool:
    """Whether a row has both answers, at least one of them not null."""
    return all(name in row for name in REQUIRED) and any(row[name] is not None for name in REQUIRED)


def conversation(row: Fields, prompt: TextOrTurns, *answers: TextOrTurns) -> tuple[TextOrTurns, ...]:
    """Returns the prompt, with the row's system text before it, and the answers. All of them are texts, or all are
    turns."""
    if not all(isinstance(side, str) for side in (prompt, *answers)):
        prompt, answers = _as_turns(prompt, "user"), tuple(_as_turns(answer, "assistant") for answer in answers)
    return _after(read_optional_text(row, "system"), prompt), *answers


def _read_margin(row: Fields) -> float:
    value = row.get("margin")
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"'margin' must be a number, not {str(value)[:40]!r}", "write a number, or leave margin out")
    return float(value)


def read_prompt(row: Fields) -> TextOrTurns | None:
    """Reads the prompt from the column that contains it. None if the row has no prompt."""
    columns = [name for name in PROMPTS if row.get(name) is not None]
    if len(columns) > 1:
        raise DataError(f"'{columns[0]}' and '{columns[1]}' are both prompts", "keep one")
    if not columns:
        return None
    prompt, more = read_side(row, columns[0]), read_optional_text(row, "input")
    if columns[0] not in ("question", "instruction") or not isinstance(prompt, str):
        return prompt
    return (Message("user", f"{prompt}\n{more}" if more else prompt),) if prompt else ()


def prompt_before(row: Fields, *answers: TextOrTurns) -> TextOrTurns | None:
    """The prompt that comes before the row's answers. None if the row has no prompt, or if all answers are complete
    conversations that contain it."""
    prompt = read_prompt(row)
    turns = _as_turns(prompt or "", "user")
    whole = all(not isinstance(answer, str) and answer[0].role in ASKING for answer in answers)
    return None if whole and all(_contains(answer, turns) for answer in answers) else prompt


def asks_again(prompt: TextOrTurns, answer: TextOrTurns) -> bool:
    """Whether the answer begins with a turn that belongs to a prompt. A question may follow an answer."""
    if isinstance(prompt, str) or isinstance(answer, str) or not prompt or not answer:
        return False
    return answer[0].role in ("system", "developer") or answer[0].role == prompt[-1].role == "user"


def _contains(answer: TextOrTurns, prompt: Turns) -> bool:
    """Whether the prompt's turns are consecutive turns of the answer. Spaces around their texts do not count."""
    sides = (_as_turns(answer, "assistant"), prompt)
    turns, part = ([(turn.role, turn.content.strip(), turn.extra) for turn in side] for side in sides)
    return any(turns[start : start + len(part)] == part for start in range(len(turns)))


def _after(system: str, prompt: TextOrTurns) -> TextOrTurns:
    """The prompt with the system text before it, unless the prompt already starts with a system turn."""
    if isinstance(prompt, str):
        return f"{system}\n\n{prompt}" if system else prompt
    return (Message("system", system), *prompt) if system and prompt[:1] and prompt[0].role != "system" else prompt


def read_side(row: Fields, name: str) -> TextOrTurns:
    """Reads a field that contains a text or messages. null and [] count as the empty text."""
    if name not in row:
        raise DataError(
            f"no field '{name}'; this row has {listed(row)}",
            "add this field, or map a column to it under data.train[].columns",
        )
    value = row[name]
    if value is None or value == []:
        return ""
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return check_text(value, name)
    if isinstance(turns[0], Mapping) and "from" in turns[0]:
        return sharegpt.read_turns(turns, name)
    return read_messages(turns, name)


def common_beginning(chosen: TextOrTurns, rejected: TextOrTurns) -> TextOrTurns:
    """The common beginning of two answers, which is the prompt of a row without a prompt.

    A space before the first difference belongs to the answers, as in TRL. If one conversation contains all turns of the
    other, the last common turn belongs to the answers.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        what = "one of 'chosen' and 'rejected' is text, and the other one is a list of messages"
        raise DataError(what, "write both as text, or both as lists of messages")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shorter = min(len(chosen), len(rejected))
    shared = next((place for place, (one, other) in pairs if one != other), shorter)
    if isinstance(chosen, str):
        shared -= chosen[shared - 1 : shared] == " "
    elif shared == shorter:
        shared = max(shared - 1, 0)
    return chosen[:shared]


def _as_turns(side: TextOrTurns, role: str) -> Turns:
    """A text becomes one turn of this role; turns are returned unchanged."""
    return side if isinstance(side, tuple) else (Message(role, side),) if side else ()
