"""`format: conll`: words and tags in the columns `tokens` and `ner_tags`, as in data sets on the hub."""

from tunekit.formats.fields import Fields
from tunekit.formats.tags import TagsExample, read_tags

DESCRIPTION = "tokens: a list of words; ner_tags: one tag for each word (the columns of data sets on the hub)"
FIELDS = ("tokens", "ner_tags")
REQUIRED = ("tokens", "ner_tags")
EXAMPLE = "tags"


def make_example(row: Fields) -> TagsExample:
    """The words and tags of a row."""
    return read_tags(row, *REQUIRED)
