"""`format: alpaca_with_input`: as alpaca_prompt, but the prompt has the section `Input` also if the row has none."""

from tunekit.formats import alpaca_prompt
from tunekit.formats.alpaca import prompt_with_input
from tunekit.formats.example import CompletionExample, Example
from tunekit.formats.fields import Fields, read_optional_text, read_text

DESCRIPTION = "as alpaca_prompt, but the prompt always has the section Input, empty for a row without input"
FIELDS = alpaca_prompt.FIELDS
REQUIRED = alpaca_prompt.REQUIRED
EXAMPLE = "text"


def make_example(row: Fields) -> Example:
    """The prompt and the answer of a row."""
    prompt = prompt_with_input(read_text(row, "instruction"), read_optional_text(row, "input"))
    return CompletionExample(prompt, read_text(row, "output"))
