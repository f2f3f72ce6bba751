"""`format: prompt`: what the model is asked, `{"prompt": ..., "answer": ...}`; the model's own answers are rewarded.

Comes in: one row; a text or a list of messages.  Goes out: PromptExample.  The answer is a reference for the reward,
and need not be there: `answer`, `completion`, `output`, or the last turn of a conversation.  Every other column is kept
as it is, for reward functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tunekit.errors import DataError
from tunekit.formats import preference
from tunekit.formats.chat import read_tools
from tunekit.formats.fields import Fields, listed
from tunekit.formats.preference import AskedExample, conversation, read_prompt, read_side
from tunekit.records import JsonObject

ALIASES = {"messages": "conversations"}
ANSWERS = ("answer", "completion", "output")
DESCRIPTION = "prompt: text or messages; answer, other columns: optional, for the reward"
FIELDS = (*preference.PROMPTS, "input", *ALIASES, *ANSWERS, "system", "tools")
REQUIRED = ()
EXAMPLE = "prompt"
KEEPS_COLUMNS = True  # rewards read those that are no field
ASKING = (*preference.PROMPTS, *ALIASES, "input", "system", "tools")  # columns that are the prompt


@dataclass(frozen=True)
class PromptExample(AskedExample):
    """What is asked, the reference answer if there is one, and the row's other columns."""

    answer: str | None = None
    columns: Fields = field(default_factory=dict)

    @property
    def prompt_value(self) -> str | list[JsonObject]:
        """The prompt as reward functions get it, like TRL's: a text, or messages."""
        return self.prompt if isinstance(self.prompt, str) else [message.as_dict() for message in self.prompt]


def make_example(row: Fields) -> PromptExample:
    """The prompt of a row, and what is said beside it."""
    for name, other in ALIASES.items():
        row = {**row, other: row[name]} if row.get(name) is not None and row.get(other) is None else row
    asked = read_prompt(row)
    if asked is None:
        raise DataError(f"no prompt; this row has {listed(row)}", "add one, or map a column to 'prompt'")
    given = [name for name in ANSWERS if row.get(name) is not None]
    answer = _read_answer(row, given[0]) if given else None
    if answer is None and not isinstance(asked, str) and asked and asked[-1].role == "assistant":
        asked, answer = asked[:-1], asked[-1].content
    (prompt,) = conversation(row, asked)
    columns = {name: value for name, value in row.items() if name not in ASKING}
    return PromptExample(prompt, answer, columns, tools=read_tools(row.get("tools")))


def _read_answer(row: Fields, name: str) -> str | None:
    """A text, turns or a whole number; what is something else is only a column."""
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    turns = isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
    if not turns and not isinstance(value, str):
        return None
    said = read_side(row, name)
    return said if isinstance(said, str) else "".join(message.content for message in said)
