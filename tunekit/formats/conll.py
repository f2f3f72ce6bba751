"""`format: conll`: words and tags in the columns of data sets on the hub, `tokens` and `ner_tags`."""

from tunekit.formats.fields import Fields
from tunekit.formats.tags import TagsExample, read_tags

DESCRIPTION = "tokens, ner_tags: words and their tags, as data sets of the hub name them"
FIELDS = ("tokens", "ner_tags")
REQUIRED = ("tokens", "ner_tags")
EXAMPLE = "tags"


def make_example(row: Fields) -> TagsExample:
    """The words and tags of a row."""
    return read_tags(row, *REQUIRED)
