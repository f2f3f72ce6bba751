"""`format: text`: `{"text": ...}`, running text, trained on completely."""

from tunekit.formats.example import Example, TextExample
from tunekit.formats.fields import Fields, read_text

DESCRIPTION = "text: all of it is trained on, with the end-of-sequence token after it"
FIELDS = ("text", "sample_weight")
REQUIRED = ("text",)
EXAMPLE = "text"


def make_example(row: Fields) -> Example:
    """The text of a row."""
    return TextExample(read_text(row, "text"))
