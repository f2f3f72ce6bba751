"""A folder for CTranslate2 and faster-whisper, written by CTranslate2's own converter."""

from collections.abc import Callable
from pathlib import Path

from tunekit.errors import Problem
from tunekit.exports.compare import difference
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.programs.ctranslate2 import NAME, answers, convert, speech_answers
from tunekit.exports.programs.program import Program, find_program
from tunekit.exports.recordings import make_recordings
from tunekit.exports.whole_model import conversion_problems, whole_model
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS = frozenset({"type"})
SUFFIX = ""
PROGRAM = NAME
MODEL_TYPES = (  # of CTranslate2 4.8.5
    "bloom codegen falcon gpt2 gpt_bigcode gptj gpt_neox gemma gemma2 gemma3_text llama mistral mpt opt phi phi3 qwen2 "
    "qwen3 whisper"
)
TYPES = (
    *("float32", "float16", "bfloat16", "int16", "int8"),
    *("int8_float32", "int8_float16", "int8_bfloat16"),
)
FILES = (  # of the model, which other programs read in the converted folder
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """The program, the model's type, and the type of the weights."""
    wrong = conversion_problems(exportable, NAME, MODEL_TYPES.split())
    if options.type not in (None, *TYPES):
        wrong.append(Problem(f"{options.type} is unknown", f"choose {', '.join(TYPES)}", key="--type"))
    if exportable.family not in ("causal", "speech"):
        wrong.append(Problem(f"{exportable.family} models are not converted", "choose another --to"))
    return wrong


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Convert the whole model. The weights keep their type unless another one is asked for."""
    program = find_program(NAME)
    assert program is not None  # a problem otherwise
    with whole_model(exportable, path) as folder:
        files = [name for name in FILES if (folder / name).is_file()]
        convert(program, folder, path, weight_type(exportable, options), files)
    speech = exportable.family == "speech"
    command = f"faster_whisper.WhisperModel({str(path)!r})" if speech else f"ctranslate2.Generator({str(path)!r})"
    return Exported(path, exportable.whole, (f"load it with: {command}",))


def weight_type(exportable: Exportable, options: Options) -> str:
    """The type that is asked for, else that of the base's weights."""
    stored = exportable.config.get("dtype") or exportable.config.get("torch_dtype")
    return options.type or (stored if stored in TYPES else "float32")


def certify(
    written: Exported, exportable: Exportable, program: Program, questions: Callable[[], Questions], options: Options
) -> Certificate:
    """Compare all log-probabilities."""
    if exportable.family == "speech":
        recordings = make_recordings(exportable)
        compared, prompts = recordings.questions, recordings.prompts
        answered = speech_answers(program, written.path, compared.rows, prompts, recordings.features)
    else:
        compared = questions()
        answered = answers(program, written.path, compared.rows)
    parts = {weight_type(exportable, options): difference(compared.rows, compared.expected, answered)}
    return Certificate("CTranslate2", program.version, compared.described, parts)
