"""A folder for ONNX Runtime and transformers.js, written by optimum."""

from collections.abc import Callable
from pathlib import Path

from tunekit.errors import Problem
from tunekit.exports.compare import difference
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.programs.onnx import NAME, answers, convert
from tunekit.exports.programs.program import find_program
from tunekit.exports.whole_model import conversion_problems, whole_model
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS: frozenset[str] = frozenset()
SUFFIX = ""
PROGRAM = NAME
MODEL_TYPES = (  # decoders of optimum-onnx 0.1.0
    "arcee bloom codegen cohere deepseek_v3 falcon gemma gemma2 gemma3_text glm gpt2 gpt_bigcode gpt_neo gpt_neox "
    "gpt_oss gptj granite helium internlm2 llama mistral mpt nemotron olmo olmo2 opt phi phi3 qwen2 qwen3 qwen3_moe "
    "smollm3 stablelm"
)


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """The program, the model's type, and a head that is not the vocabulary's."""
    wrong = conversion_problems(exportable, NAME, MODEL_TYPES)
    if exportable.family != "causal":
        wrong.append(Problem(f"{exportable.family} models are not converted", "choose another --to"))
    return wrong


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Convert the whole model to float32."""
    program = find_program(NAME)
    assert program is not None  # a problem otherwise
    with whole_model(exportable, path) as folder:
        convert(program, folder, path)
    what = "merged" if exportable.kind == "adapter" else "model"
    return Exported(path, what, (f"load it with: onnxruntime.InferenceSession({str(path / 'model.onnx')!r})",))


def certify(
    written: Exported, exportable: Exportable, questions: Callable[[], Questions], options: Options
) -> Certificate | None:
    """Compare all log-probabilities."""
    program = find_program(NAME)
    if program is None:
        return None
    compared = questions()
    parts = {written.what: difference(compared.rows, compared.expected, answers(program, written.path, compared.rows))}
    return Certificate("ONNX Runtime", program.version, compared.described, parts)
