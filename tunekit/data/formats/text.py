"""`format: text`: `{"text": ...}`, running text trained on whole.

Comes in: one row.  Goes out: TextExample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.data.examples import Example, TextExample
from tunekit.data.formats.fields import read_text


def make_example(row: Mapping[str, Any]) -> Example:
    """The text of a row."""
    return TextExample(read_text(row, "text"))
