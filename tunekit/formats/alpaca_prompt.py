"""`format: alpaca_prompt`: Stanford Alpaca's prompt as plain text, also if the tokenizer has a chat template."""

from tunekit.formats.alpaca import plain_prompt
from tunekit.formats.example import CompletionExample, Example
from tunekit.formats.fields import Fields, read_optional_text, read_text

DESCRIPTION = "as alpaca, but always Stanford Alpaca's prompt as plain text, without the chat template"
FIELDS = ("instruction", "input", "output", "sample_weight")
REQUIRED = ("instruction", "output")
EXAMPLE = "text"


def make_example(row: Fields) -> Example:
    """The prompt and the answer of a row."""
    prompt = plain_prompt(read_text(row, "instruction"), read_optional_text(row, "input"))
    return CompletionExample(prompt, read_text(row, "output"))
