"""`tunekit schema`: writes all keys of recipes, as JSON Schema for an editor or as readable text.
An output file with the ending .txt or .md gets the readable text.
"""

from pathlib import Path

from tunekit.errors import InputError
from tunekit.files.durable import write_text
from tunekit.recipe.reading.schema import make_reference, schema_text


def schema_verb(output: str | None, reference: bool) -> None:
    """Write the JSON Schema or the readable text to `output`, or print it. Raises: InputError if `output` is an
    existing file with other content."""
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
