"""Reads the settings and the tensors of a GGUF file, by the names that llama.cpp uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunekit.errors import ModelError
from tunekit.model.storage.source import ModelSource

if TYPE_CHECKING:
    from gguf import ReaderTensor

KEY = "model.name_or_path"
FOLDER = "use the original model's folder instead of the GGUF file"
DAMAGE = (ValueError, IndexError, KeyError, OverflowError)  # gguf's errors for a file that ends too early


@dataclass(frozen=True)
class GgufFacts:
    """A parsed GGUF file. `settings`: values by llama.cpp's names without the prefix of the architecture. `tensors`: by
    llama.cpp's names."""

    name: str
    architecture: str
    settings: dict[str, object]
    tensors: dict[str, ReaderTensor]

    def refuse(self, what: str) -> ModelError:
        """The error for a file whose model transformers would compute differently from llama.cpp. `what`: the
        reason."""
        return ModelError(f"{self.name}: {what}", FOLDER, key=KEY)


def read_facts(source: ModelSource) -> GgufFacts:
    """Parse the file.

    Raises: ModelError for a damaged file, and for a file that is one part of a split model.
    """
    import gguf

    path = source.folder / str(source.gguf_file)
    try:
        reader = gguf.GGUFReader(str(path))
        architecture = str(reader.fields["general.architecture"].contents())
    except DAMAGE as error:
        raise ModelError("the file is damaged, or ends too early", "fetch it again", file=str(path)) from error
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        how = "join the parts: llama-gguf-split --merge FIRST_PART WHOLE_FILE"
        raise ModelError(f"the file is only one of {parts.contents()} parts of a model", how, file=str(path))
    prefix = f"{architecture}."
    fields = {name: field for name, field in reader.fields.items() if name.startswith(prefix)}
    settings = {name.removeprefix(prefix): field.contents() for name, field in fields.items()}
    return GgufFacts(source.name_or_path, architecture, settings, {each.name: each for each in reader.tensors})


@contextmanager
def damage_named(source: ModelSource) -> Iterator[None]:
    """Context manager for code that reads a base. If the code fails because a GGUF file is damaged, a ModelError that
    states the damage replaces the error."""
    try:
        yield
    except Exception:
        if source.gguf_file is not None:
            read_facts(source)
        raise
