"""`format: unpaired`: an answer with its rating, good or bad, `{"prompt": ..., "completion": ..., "label": true}`.

Prompt and completion are texts or lists of messages. Rows of LLaMA-Factory (instruction and output, or a conversation
that ends with the answer, and kto_tag) and of Axolotl (question) become turns, as in those tools. A preference pair
becomes two rows, one good and one bad.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tunekit.errors import DataError
from tunekit.formats import preference
from tunekit.formats.chat import read_tools
from tunekit.formats.fields import Fields, read_value
from tunekit.formats.preference import (
    PromptedExample,
    TextOrTurns,
    conversation,
    is_pair,
    prompt_before,
    read_prompt,
    read_side,
)

ALIASES = {"kto_tag": "label", "output": "completion", "messages": "conversations"}
DESCRIPTION = "prompt, completion: text or messages; label: true or false; system, tools: optional"
FIELDS = (*preference.FIELDS, "completion", "label", *ALIASES)
REQUIRED = ("label",)
EXAMPLE = "unpaired"


@dataclass(frozen=True)
class UnpairedExample(PromptedExample):
    """A prompt, its answer of the same type, and whether the answer is good."""

    completion: TextOrTurns
    label: bool


def make_example(row: Fields) -> UnpairedExample:
    """Reads an answer, its prompt and its rating. A missing text counts as empty."""
    if is_pair(row):  # is read twice, once with each label
        pair, label = preference.make_example(row), read_value(row, "label")
        return UnpairedExample(pair.prompt, pair.chosen if label else pair.rejected, bool(label), tools=pair.tools)
    for name, field in ALIASES.items():
        if row.get(name) is not None and row.get(field) is not None:
            raise DataError(f"'{field}' and '{name}' have the same meaning", "keep one")
        row = {**row, field: row[name]} if row.get(name) is not None else row
    label = read_value(row, "label")
    if not isinstance(label, bool):
        raise DataError(f"'label' must be true or false, not {str(label)[:40]!r}", "write true for a good answer")
    prompt, answer = conversation(row, *_read_answered(row))
    return UnpairedExample(prompt, answer, label, tools=read_tools(row.get("tools")))


def single_row(row: Fields) -> Fields:
    """A row that means the same in any file. A pair that is read with one of the two labels becomes a row with this
    answer only: otherwise a reader would make two rows of it again."""
    if not is_pair(row):
        return row
    value = row["chosen" if read_value(row, "label") else "rejected"]
    answer = [value] if isinstance(value, Mapping) else value or ""
    others = {name: row[name] for name in row if name not in (*preference.REQUIRED, "margin", *ALIASES)}
    answers = [read_side(row, name) for name in preference.REQUIRED]
    if prompt_before(row, *answers) is not None:
        return {**others, "completion": answer}
    begin = len(preference.common_beginning(*answers))
    others = {name: value for name, value in others.items() if name not in (*preference.PROMPTS, "input")}
    return {**others, "prompt": answer[:begin], "completion": answer[begin:]}


def _read_answered(row: Fields) -> tuple[TextOrTurns, TextOrTurns]:
    """Reads the prompt and the answer. If the row contains only a conversation, or if its answer is a conversation that
    contains the prompt, the last turn is the answer."""
    if row.get("completion") is None:
        prompt = turns = read_prompt(row) or ""
    else:
        answer = read_side(row, "completion")
        prompt = prompt_before(row, answer) or ""
        turns = "" if prompt else answer
    if not isinstance(turns, str) and turns[-1].role == "assistant":
        return turns[:-1], turns[-1:]
    return prompt, read_side(row, "completion")
