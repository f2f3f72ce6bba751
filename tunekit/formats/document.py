"""`format: document`: a document to search, `{"text": ...}`; an optional title is put before the text."""

from tunekit.formats.embedding import POSITIVES, EmbeddingExample
from tunekit.formats.fields import Fields, read_text

NAMES = ("text", "contents", "body", *POSITIVES)
DESCRIPTION = "text (or document, passage, contents): a document to search; title, optional, is put before it"
FIELDS = ("text", "title")
REQUIRED = ("text",)
EXAMPLE = "document"


def make_example(row: Fields) -> EmbeddingExample:
    """The text of a document, after its title and a space. Raises: DataError without a text."""
    text = read_text(row, next((name for name in NAMES if name in row), "text"))
    title = row.get("title")
    return EmbeddingExample((f"{title} {text}" if isinstance(title, str) and title.strip() else text,))
