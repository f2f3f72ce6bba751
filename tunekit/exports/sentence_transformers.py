"""A folder of sentence-transformers: an embedding model with its modules in the schema up to version 5.3, or a
reranker. It is the folder that `tunekit merge` writes: later versions and transformers read it too, and many other
programs read only this schema."""

import shutil
from pathlib import Path

from tunekit.arithmetic.merge import merge
from tunekit.errors import Problem
from tunekit.exports.format import Evidence, Exported, Options
from tunekit.exports.whole_model import packed_problems, whole_model
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS: frozenset[str] = frozenset()
SUFFIX = ""
PROGRAM = ""
CLASSES = {"embedding": "SentenceTransformer", "relevance": "CrossEncoder"}  # by the kind of answers


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to write: the model is neither an embedding model nor a reranker, or it is a GGUF file."""
    objective = exportable.objective
    if objective is None or objective.answering is None or objective.answering.kind not in CLASSES:
        trained = "the model has no modules.json" if objective is None else f"it was trained with {objective.name}"
        what = f"sentence-transformers reads embedding models and rerankers, and {trained}"
        return [Problem(what, "choose another --to")]
    if exportable.kind == "model" and exportable.gguf_file is not None:
        return [Problem("the model is a GGUF file, which sentence-transformers does not read", "name a folder")]
    return packed_problems(exportable)


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Merge the adapter, or copy the model. In both cases the objective's processor writes the modules."""
    assert exportable.objective is not None  # a problem otherwise
    answering = exportable.objective.answering
    assert answering is not None  # a problem otherwise
    if exportable.kind == "adapter":
        merge(exportable.target, path)
    else:
        with whole_model(exportable, path) as folder:
            shutil.copytree(folder, path)
        assert answering.processor is not None
        answering.processor.save(path)
    load = f"sentence_transformers.{CLASSES[answering.kind]}({str(path)!r})"
    return Exported(path, exportable.whole, (f"load it with: {load}",))
