"""`tunekit schema`: what a recipe may hold, as JSON Schema for an editor or as a text for a person.
A file whose name ends in .txt or .md gets the text.
"""

from pathlib import Path

from tunekit.files.durable import write_text
from tunekit.recipe.reading.schema import make_reference, schema_text


def schema_verb(output: str | None, reference: bool) -> None:
    """Write the schema, or the reference text."""
    as_text = reference or (output is not None and output.endswith((".txt", ".md")))
    text = make_reference() if as_text else schema_text()
    if output is None:
        print(text, end="")
        return
    write_text(Path(output), text)
    print(f"wrote {output}")
