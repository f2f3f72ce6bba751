"""A folder of sentence-transformers, with its modules in the schema up to version 5.3. It is the folder that `tunekit
merge` writes: later versions and transformers read it too, and many other programs read only this schema."""

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


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to write: the model gives no embeddings, or it is a GGUF file."""
    objective = exportable.objective
    if objective is None or objective.name != "embed":
        trained = "the model has no modules.json" if objective is None else f"it was trained with {objective.name}"
        return [Problem(f"sentence-transformers reads embedding models, and {trained}", "choose another --to")]
    if exportable.kind == "model" and exportable.gguf_file is not None:
        return [Problem("the model is a GGUF file, which sentence-transformers does not read", "name a folder")]
    return packed_problems(exportable)


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Merge the adapter, or copy the model. In both cases the objective's processor writes the modules."""
    if exportable.kind == "adapter":
        merge(exportable.target, path)
    else:
        with whole_model(exportable, path) as folder:
            shutil.copytree(folder, path)
        assert exportable.objective is not None  # a problem otherwise
        answering = exportable.objective.answering
        assert answering is not None  # of every embedding model
        assert answering.processor is not None
        answering.processor.save(path)
    load = f"sentence_transformers.SentenceTransformer({str(path)!r})"
    return Exported(path, exportable.whole, (f"load it with: {load}",))
