"""`tunekit schema`: writes all keys of recipes, as JSON Schema for an editor or as readable text.
A file name that ends in .txt or .md means readable text.
"""

from pathlib import Path

from tunekit.errors import InputError
from tunekit.files.durable import write_text
from tunekit.recipe.reading.schema import make_reference, schema_text


def schema_verb(output: str | None, reference: bool) -> None:
    """Write the schema, or the text. Raises: InputError if the output is an existing file of a different kind."""
    as_text = reference or (output is not None and output.endswith((".txt", ".md")))
    text = make_reference() if as_text else schema_text()
    if output is None:
        print(text, end="")
        return
    path, start = Path(output), text[:12].encode()
    if path.is_file() and path.stat().st_size and not path.read_bytes().startswith(start):
        raise InputError(
            f"--output {output} exists and is not a {'reference' if as_text else 'schema'}", "name a new file"
        )
    write_text(path, text)
    print(f"wrote {output}")
