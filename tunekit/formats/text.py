"""`format: text`: `{"text": ...}`, running text trained on whole.

Comes in: one row.  Goes out: TextExample.
"""

from collections.abc import Mapping
from typing import Any

from tunekit.formats.example import Example, TextExample
from tunekit.formats.fields import read_text

DESCRIPTION = "text: trained on whole, with the end-of-sequence token after it"
FIELDS = ("text", "sample_weight")
REQUIRED = ("text",)
EXAMPLE = "text"


def make_example(row: Mapping[str, Any]) -> Example:
    """The text of a row."""
    return TextExample(read_text(row, "text"))
