"""`format: alpaca`: `{"instruction": ..., "input": ..., "output": ...}`, with optional `system` and `history`.

Instruction and input, joined by a newline, are the user's turn. If the tokenizer has no chat template, Stanford
Alpaca's prompt is used.
"""

from collections.abc import Iterable

from tunekit.errors import DataError
from tunekit.formats.example import ChatExample, CompletionExample, Example, Message
from tunekit.formats.fields import Fields, check_text, read_optional_text, read_text

DESCRIPTION = "instruction, input (may be empty or absent), output; system: optional"
FIELDS = ("instruction", "input", "output", "system", "history", "sample_weight")
REQUIRED = ("instruction", "output")
EXAMPLE = "text"

_HEADER = "Below is an instruction that describes a task"
_TASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
_WITH_INPUT = f"{_HEADER}, paired with an input that provides further context. {_TASK}"
_WITHOUT_INPUT = f"{_HEADER}. {_TASK}"


def make_example(row: Fields) -> Example:
    """The conversation of a row: system, history, question and answer."""
    instruction, output = read_text(row, "instruction"), read_text(row, "output")
    extra_input, system = read_optional_text(row, "input"), read_optional_text(row, "system")
    messages = [Message("system", system)] if system else []
    history = _read_history(row.get("history"))
    messages += history
    messages.append(Message("user", f"{instruction}\n{extra_input}" if extra_input else instruction))
    messages.append(Message("assistant", output))
    start = f"{system}\n\n" if system else ""
    plain = None if history else CompletionExample(f"{start}{plain_prompt(instruction, extra_input)}", output)
    return ChatExample(tuple(messages), without_template=plain)


def plain_prompt(instruction: str, extra_input: str) -> str:
    """Stanford Alpaca's prompt. Without an input, it has no section for one."""
    if extra_input:
        return prompt_with_input(instruction, extra_input)
    return f"{_WITHOUT_INPUT}{instruction}\n\n### Response:\n"


def prompt_with_input(instruction: str, extra_input: str) -> str:
    """Stanford Alpaca's prompt with its section for the input."""
    return f"{_WITH_INPUT}{instruction}\n\n### Input:\n{extra_input}\n\n### Response:\n"


def _read_history(value: object) -> list[Message]:
    """Reads earlier exchanges, given as [[question, answer], ...]."""
    messages: list[Message] = []
    history = value or []
    for index, pair in enumerate(history if isinstance(history, Iterable) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"'history[{index}]' is not a pair", 'write ["question", "answer"]')
        messages.append(Message("user", check_text(pair[0], f"history[{index}][0]")))
        messages.append(Message("assistant", check_text(pair[1], f"history[{index}][1]")))
    return messages
