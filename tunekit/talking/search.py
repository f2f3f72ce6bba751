"""Searches the documents of a run's rows with its embedding model."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from tunekit.console import Console, visible
from tunekit.data.encoding.sources import read_examples
from tunekit.errors import InputError
from tunekit.formats.embedding import EmbeddingExample
from tunekit.recipe.bases.section import LARGEST_COUNT
from tunekit.recipe.data import DataSection
from tunekit.talking.embedder import Embedder

SHOWN = 5  # documents of an answer
LEAVE = ("/quit", "/exit")


@dataclass
class DocumentSearch:
    """Documents, and their embeddings of length 1. Each line of the user is a query."""

    embedder: Embedder
    console: Console
    documents: list[str]
    vectors: Tensor = field(repr=False)  # (N, D)
    ended: bool = False

    def line(self, text: str) -> None:
        """Print the documents with the largest cosine, the best first. Raises: InputError for an unknown command."""
        self.ended = text in LEAVE
        if text.startswith("/") and not self.ended:
            raise InputError(f"there is no command {text.split()[0]}", "write a query, or /quit")
        if not self.ended:
            query = F.normalize(self.embedder.embed([self.embedder.encode(text, "query")]), dim=-1)  # (1, D)
            scores, places = (query @ self.vectors.T)[0].topk(min(SHOWN, len(self.documents)))
            for score, place in zip(scores.tolist(), places.tolist(), strict=True):
                self.console.write(f"{score:.3f}  {visible(self.documents[place])}\n")


def make_search(embedder: Embedder, console: Console) -> DocumentSearch:
    """Embed the distinct documents of all rows of the target's data section. Raises: InputError if it has none."""
    data = embedder.loaded.target.data
    if data is None:
        raise InputError("the target names no rows whose documents could be searched", "name a run, or a recipe")
    documents = documents_of(data, embedder.rows.example)
    console.info(f"embedding {len(documents):,} documents of the rows ...")
    vectors = embedder.embed([embedder.encode(text, "document") for text in documents])
    return DocumentSearch(embedder, console, documents, F.normalize(vectors, dim=-1))


def documents_of(data: DataSection, kind: str) -> list[str]:
    """The distinct texts of all rows but the anchors, in the order of the rows. `kind`: the kind of the examples."""
    sources = [*data.train, *(data.eval if isinstance(data.eval, tuple) else ())]
    examples = (example for source in sources for _, example in read_examples(source, kind, range(LARGEST_COUNT)))
    texts = (text for example in examples if isinstance(example, EmbeddingExample) for text in example.texts[1:])
    return list(dict.fromkeys(text for text in texts if text.strip()))
