"""Embeds texts with a model that was trained with the objective embed, and writes the embeddings to a file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunekit.contracts import Row
from tunekit.errors import DataError, InputError
from tunekit.files.work_folder import new_path, refuse_inside
from tunekit.model.storage.sentence_transformers import DEFAULT_LENGTH
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.objectives.losses.embeddings import EmbedLoss
from tunekit.objectives.rows.texts import TextGroups
from tunekit.targets.target import LoadedTarget
from tunekit.tuned.model import ModelRun

SIDES = ("document", "query")  # whose prompt and maximum length a text gets
ENDINGS = (".npy", ".parquet", ".jsonl")


@dataclass(frozen=True)
class Embedder:
    """Embeds texts with a loaded target, `batch_size` texts at a time."""

    loaded: LoadedTarget
    rows: TextGroups
    loss: EmbedLoss
    batch_size: int

    def encode(self, text: str, side: str) -> Row:
        """The row of a text, with its side's prompt, cut to its side's maximum length. Raises: DataError for an empty
        text."""
        if not text.strip():
            raise DataError("the text is empty", "write at least one character")
        row = self.rows.text_row(text, side)
        facts = self.loaded.model.base.text
        assert facts is not None  # the family reads texts
        check_vocabulary(self.loaded.tokenizer, facts.vocabulary_size, int(row.parts["ids"].max()))
        return row

    @property
    def width(self) -> int:
        """The number of numbers of an embedding."""
        if self.loss.dense:
            return self.loss.dense[-1].facts[1]
        base = self.loaded.model.base
        return base.family.hidden_size(base.net) * len(self.loss.pooling)

    def embed(self, rows: Sequence[Row], before_batch: Callable[[], None] = lambda: None) -> Tensor:
        """The embedding of each row, (N, D) on the host. Texts of similar length are computed together."""
        run, vectors = ModelRun(self.loaded.model, self.rows), list[Tensor]()
        order = sorted(range(len(rows)), key=lambda place: rows[place].sizes)
        for start in range(0, len(order), self.batch_size):
            before_batch()
            batch = self.rows.collate([[rows[place]] for place in order[start : start + self.batch_size]])
            vectors += run.score([batch], self.loss.embed)
        return torch.cat(vectors)[torch.tensor(order).argsort()]

    def shortened(self, vectors: Tensor, dimensions: int) -> Tensor:
        """The first numbers of each embedding, with length 1 if the embeddings have length 1."""
        return F.normalize(vectors[:, :dimensions], dim=-1) if self.loss.normalize else vectors[:, :dimensions]


def make_embedder(loaded: LoadedTarget, batch_size: int) -> Embedder:
    """Make an embedder. Raises: InputError if the target was not trained for embeddings."""
    objective, base = loaded.objective, loaded.model.base
    if not isinstance(objective.rows, TextGroups) or not isinstance(objective.loss, EmbedLoss):
        raise InputError(f"the target was trained with {objective.name}, so it gives no embeddings", "name another one")
    room = (base.positions or DEFAULT_LENGTH) - loaded.model.virtual_tokens
    return Embedder(loaded, objective.rows.within(room), objective.loss, batch_size)


def floats(vector: Tensor) -> list[float]:
    """The numbers of a float32 embedding, as short decimals that stand for the same float32 numbers."""
    return [float(f"{value:.9g}") for value in vector.tolist()]


def check_output(path: Path) -> None:
    """Check the file for embeddings before a model is loaded. Raises: InputError."""
    if path.suffix not in ENDINGS:
        raise InputError(f"{path} does not end in {', '.join(ENDINGS)}", "choose another --output", key="--output")
    if path.exists():
        raise InputError(f"{path} exists", "choose another --output", key="--output")
    refuse_inside(path)


def write_vectors(path: Path, texts: Sequence[str], vectors: Tensor) -> None:
    """Write the embeddings (N, D) in the order of the texts: as a matrix (.npy), or with the texts (.parquet, .jsonl).
    The file is written completely or not at all."""
    with new_path(path) as partial:
        if path.suffix == ".npy":
            np.save(partial, vectors.numpy())
        elif path.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                for text, vector in zip(texts, vectors, strict=True):
                    file.write(json.dumps({"prompt": text, "embedding": floats(vector)}, ensure_ascii=False) + "\n")
        else:
            _write_parquet(partial, texts, vectors)


def _write_parquet(path: Path, texts: Sequence[str], vectors: Tensor) -> None:
    import pyarrow
    import pyarrow.parquet

    numbers = pyarrow.array(vectors.flatten().numpy())
    lists = pyarrow.FixedSizeListArray.from_arrays(numbers, vectors.shape[1])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": list(texts), "embedding": lists}), path)
