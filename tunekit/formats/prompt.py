"""`format: prompt`: a prompt for the model to answer, `{"prompt": ..., "answer": ...}`, a text or messages.

The answer is optional. It is a reference for the reward: `answer`, `completion`, `output`, or the last turn of a
conversation. Reward functions get all other columns without changes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunekit.basics import JsonObject
from tunekit.errors import DataError
from tunekit.formats import preference
from tunekit.formats.chat import read_tools
from tunekit.formats.fields import Fields, check_encodable, listed
from tunekit.formats.preference import PromptedExample, conversation, read_prompt, read_side

ALIASES = {"messages": "conversations"}
ANSWERS = ("answer", "completion", "output")
DESCRIPTION = "prompt: text or messages; answer and other columns: optional, used by the reward"
FIELDS = (*preference.PROMPTS, "input", *ALIASES, *ANSWERS, "system", "tools")
REQUIRED = ()
EXAMPLE = "prompt"
KEEPS_COLUMNS = True  # rewards read the other columns
PROMPT_COLUMNS = (*preference.PROMPTS, *ALIASES, "input", "system", "tools")


@dataclass(frozen=True)
class PromptExample(PromptedExample):
    """A prompt, the reference answer if there is one, and the row's other columns."""

    answer: str | None = None
    columns: Fields = field(default_factory=dict)

    @property
    def prompt_value(self) -> str | list[JsonObject]:
        """The prompt in the form that reward functions get, as in TRL: a text, or messages."""
        return self.prompt if isinstance(self.prompt, str) else [message.as_dict() for message in self.prompt]


def make_example(row: Fields) -> PromptExample:
    """The prompt of a row, its reference answer and its other columns."""
    for name, other in ALIASES.items():
        row = {**row, other: row[name]} if row.get(name) is not None and row.get(other) is None else row
    prompt = read_prompt(row)
    if prompt is None:
        raise DataError(f"no prompt; this row has {listed(row)}", "add a prompt, or map a column to 'prompt'")
    column = next((name for name in ANSWERS if row.get(name) is not None), None)
    answer = _read_answer(row, column) if column else None
    if answer is None and not isinstance(prompt, str) and prompt and prompt[-1].role == "assistant":
        prompt, answer = prompt[:-1], prompt[-1].content
    (prompt,) = conversation(row, prompt)
    columns = {name: value for name, value in row.items() if name not in PROMPT_COLUMNS}
    for name, value in columns.items():
        check_encodable(json.dumps({name: value}, default=str, ensure_ascii=False), name)
    return PromptExample(prompt, answer, columns, tools=read_tools(row.get("tools")))


def _read_answer(row: Fields, name: str) -> str | None:
    """Reads the reference answer from a text, turns or a whole number. Returns None for any other value; such a column
    is not an answer."""
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    turns = isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
    if not turns and not isinstance(value, str):
        return None
    answer = read_side(row, name)
    return answer if isinstance(answer, str) else "".join(message.content for message in answer)
