"""`format: unpaired`: an answer and whether it is a good one, `{"prompt": ..., "completion": ..., "label": true}`.

Comes in: one row; texts or lists of messages.  Goes out: UnpairedExample.  LLaMA-Factory's rows (instruction and
output, or a conversation whose last turn is the answer, and kto_tag) and Axolotl's (question) are turns, as there. A
preference pair is two such rows.
"""

from dataclasses import dataclass

from tunekit.errors import DataError
from tunekit.formats import preference
from tunekit.formats.chat import read_tools
from tunekit.formats.fields import Fields, read_value
from tunekit.formats.preference import AskedExample, Said, conversation, is_pair, read_prompt, read_side

ALIASES = {"kto_tag": "label", "output": "completion", "messages": "conversations"}
DESCRIPTION = "prompt, completion: text or messages; label: true or false; system, tools: optional"
FIELDS = (*preference.FIELDS, "completion", "label", *ALIASES)
REQUIRED = ("label",)
EXAMPLE = "unpaired"


@dataclass(frozen=True)
class UnpairedExample(AskedExample):
    """An answer, written as the prompt is, and whether it is a good one."""

    completion: Said
    label: bool


def make_example(row: Fields) -> UnpairedExample:
    """The answer of a row, with its prompt. What says nothing is empty."""
    if is_pair(row):  # which is read twice, with either label
        pair, label = preference.make_example(row), read_value(row, "label")
        return UnpairedExample(pair.prompt, pair.chosen if label else pair.rejected, bool(label), tools=pair.tools)
    for name, field in ALIASES.items():
        if row.get(name) is not None and row.get(field) is not None:
            raise DataError(f"'{field}' and '{name}' are one thing", "keep one")
        row = {**row, field: row[name]} if row.get(name) is not None else row
    label = read_value(row, "label")
    if not isinstance(label, bool):
        raise DataError(f"'label' must be true or false, not {str(label)[:40]!r}", "write true for a good answer")
    prompt, answer = conversation(row, *_read_answered(row))
    return UnpairedExample(prompt, answer, label, tools=read_tools(row.get("tools")))


def _read_answered(row: Fields) -> tuple[Said, Said]:
    """The prompt and its answer; of a conversation with nothing beside it, the last turn is that."""
    prompt, alone = read_prompt(row) or "", row.get("completion") is None
    whole = prompt if alone else "" if prompt else read_side(row, "completion")
    if not isinstance(whole, str) and whole[-1].role == "assistant":
        return whole[:-1], whole[-1:]
    return prompt, read_side(row, "completion")
