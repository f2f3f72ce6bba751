"""`format: alpaca_turn`: Stanford Alpaca's prompt as the user's turn of a conversation."""

from tunekit.formats import alpaca_prompt
from tunekit.formats.example import ChatExample, CompletionExample, Example, Message
from tunekit.formats.fields import Fields

DESCRIPTION = "as alpaca, but the user's turn is Stanford Alpaca's whole prompt"
FIELDS = alpaca_prompt.FIELDS
REQUIRED = alpaca_prompt.REQUIRED
EXAMPLE = "text"


def make_example(row: Fields) -> Example:
    """The conversation of a row: the prompt and the answer."""
    plain = alpaca_prompt.make_example(row)
    assert isinstance(plain, CompletionExample)
    return ChatExample((Message("user", plain.prompt), Message("assistant", plain.completion)), without_template=plain)
