"""`format: tags`: words and one tag for each, `{"words": [...], "tags": [...]}`.

A tag is text. A whole number is an index into objective.labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunekit.errors import DataError
from tunekit.formats.fields import Fields, check_text, read_value

DESCRIPTION = "words, tags: two lists of equal length; a tag is a name, or an index into objective.labels"
FIELDS = ("words", "tags")
REQUIRED = ("words", "tags")
EXAMPLE = "tags"


@dataclass(frozen=True)
class TagsExample:
    """Words and their tags. A number is an index into the labels of the recipe."""

    words: tuple[str, ...]
    tags: tuple[str | int, ...]


def make_example(row: Fields) -> TagsExample:
    """The words and tags of a row."""
    return read_tags(row, *REQUIRED)


def read_tags(row: Fields, words: str, tags: str) -> TagsExample:
    """Reads the words and the tags of a row from these two columns, which must be lists of equal length."""
    pairs = _read_list(row, words), _read_list(row, tags)
    if len(pairs[0]) != len(pairs[1]):
        what = f"{len(pairs[0])} {words}, but {len(pairs[1])} {tags}"
        raise DataError(what, "write one tag for each word")
    texts = [check_text(word, f"{words}[{at}]") for at, word in enumerate(pairs[0])]
    blank = next((at for at, word in enumerate(texts) if not word.strip()), None)
    if blank is not None:
        raise DataError(f"'{words}[{blank}]' is empty", "remove the empty word and its tag")
    return TagsExample(tuple(texts), tuple(_read_tag(tag, f"{tags}[{at}]") for at, tag in enumerate(pairs[1])))


def _read_list(row: Fields, name: str) -> Sequence[Any]:
    value = read_value(row, name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"'{name}' must be a list, not {type(value).__name__}", "write [...]")
    return value


def _read_tag(value: object, label: str) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    tag = check_text(value, label).strip()
    if not tag:
        raise DataError(f"'{label}' is empty", "write O for a word without a tag")
    return tag
