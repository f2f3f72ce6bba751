"""A folder for ONNX Runtime and transformers.js, written by optimum."""

from collections.abc import Callable
from pathlib import Path

from tunekit.errors import Problem
from tunekit.exports.compare import difference
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.programs.onnx import NAME, answers, convert
from tunekit.exports.programs.program import Program, find_program
from tunekit.exports.whole_model import conversion_problems, whole_model
from tunekit.model.storage.supported import OPTIMUM_DECODERS
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS: frozenset[str] = frozenset()
SUFFIX = ""
PROGRAM = NAME


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to convert: optimum is missing, or it does not support the model's type."""
    return conversion_problems(exportable, NAME, {"causal"}, OPTIMUM_DECODERS)


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Convert the whole model to float32."""
    program = find_program(NAME)
    assert program is not None  # a problem otherwise
    with whole_model(exportable, path) as folder:
        convert(program, folder, path)
    return Exported(
        path, exportable.whole, (f"load it with: onnxruntime.InferenceSession({str(path / 'model.onnx')!r})",)
    )


def certify(
    written: Exported, exportable: Exportable, program: Program, questions: Callable[[], Questions], options: Options
) -> Certificate:
    """Compare all log-probabilities with torch's."""
    compared = questions()
    parts = {written.what: difference(compared.rows, compared.expected, answers(program, written.path, compared.rows))}
    return Certificate("ONNX Runtime", program.version, compared.described, parts)
