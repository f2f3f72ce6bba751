"""A folder for CTranslate2 and faster-whisper, written by CTranslate2's own converter."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tunekit.errors import Problem
from tunekit.exports.compare import difference
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.programs.ctranslate2 import NAME, answers, convert, speech_answers
from tunekit.exports.programs.program import Program, find_program
from tunekit.exports.questions import TOKENS
from tunekit.exports.recordings import make_recordings
from tunekit.exports.settings import Ignored, complete_config, ignored_problems
from tunekit.exports.whole_model import conversion_problems, whole_model
from tunekit.model.storage.llama_cpp import Configuration
from tunekit.model.storage.windows import sliding_window
from tunekit.records import JsonObject
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS = frozenset({"type"})
SUFFIX = ""
PROGRAM = NAME
# Those that CTranslate2 4.8.5 reads and computes as torch does. Its converter fails at the classes of transformers 5 of
# gpt_neox, mpt, phi and phi3, and it has no softcapping, which gemma2 needs.
MODEL_TYPES = "bloom codegen falcon gemma gemma3_text gpt2 gpt_bigcode gptj llama mistral opt qwen2 qwen3 whisper"
SILU, TANH, YES, NO, NONE = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new"), (True,), (False,), (None,)
# model type -> setting -> the only values with which CTranslate2 computes, or which its converter reads
FIXED: dict[str, dict[str, tuple[object, ...]]] = {
    "bloom": {"apply_residual_connection_post_layernorm": NO},
    "falcon": {"activation": ("gelu",), "new_decoder_architecture": NO},
    "gemma": {"attention_bias": NO, "hidden_act": TANH},
    "gemma3_text": {
        "attn_logit_softcapping": NONE,
        "final_logit_softcapping": NONE,
        "use_bidirectional_attention": NO,
        "hidden_activation": (*TANH, "gelu"),
    },
    "gpt2": {"scale_attn_by_inverse_layer_idx": NO, "scale_attn_weights": YES},
    "gpt_bigcode": {"multi_query": YES, "scale_attn_weights": YES},
    "opt": {"layer_norm_elementwise_affine": YES},
    **{kind: {"hidden_act": SILU} for kind in ("llama", "mistral", "qwen2", "qwen3")},
}
# the scalings of positions of each type, where there are any
SCALINGS = {"llama": ("linear", "llama3"), **dict.fromkeys(("mistral", "qwen2", "qwen3"), ("linear",))}
# the only theta of each type; the others have that of the base
THETAS = {"falcon": (1e4, 1e4), "gemma": (1e4, 1e4), "gemma3_text": (1e6, 1e4)}  # of full and of windowed attention
EPSILONS = ("rms_norm_eps", "layer_norm_epsilon")
TYPES = (*("float32", "float16", "bfloat16", "int16", "int8"), *("int8_float32", "int8_float16", "int8_bfloat16"))
FILES = (  # of the model, which other programs read in the converted folder
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to convert: CTranslate2 is missing, or does not support the model, its settings or the type of
    weights."""
    wrong = conversion_problems(exportable, NAME, {"causal", "speech"}, MODEL_TYPES.split())
    if options.type not in (None, *TYPES):
        wrong.append(Problem(f"{options.type} is unknown", f"choose {', '.join(TYPES)}", key="--type"))
    known = exportable.config.get("model_type") in MODEL_TYPES.split()
    return wrong + ignored_problems("CTranslate2", ignored_settings(exportable.config) if known else ())


def ignored_settings(config: Configuration) -> Iterator[Ignored]:
    """Each setting of a base that CTranslate2 ignores: its name, its value, and the values that CTranslate2 uses."""
    config = complete_config(config)
    kind = str(config.get("model_type"))
    fixed = dict(FIXED.get(kind, {}))
    if kind == "llama":
        fixed["head_dim"] = (config["hidden_size"] // config["num_attention_heads"],)
    elif kind == "gemma3_text":
        fixed["query_pre_attn_scalar"] = (config["head_dim"],)
    elif kind == "falcon" and not config["multi_query"]:
        fixed["parallel_attn"] = NO
    for name, taken in fixed.items():
        if name in config and config[name] not in taken:
            yield name, config[name], " or ".join(map(str, taken))
    rope = config.get("rope_parameters") or {}
    for place, part in enumerate(("full_attention", "sliding_attention")):
        values = rope.get(part) or (rope if "rope_type" in rope else {})
        scalings = ("default", *SCALINGS.get(kind, ()))
        if values.get("rope_type", "default") not in scalings:
            yield "rope_type", values["rope_type"], " or ".join(scalings)
        if values.get("partial_rotary_factor") not in (None, 1):
            yield "partial_rotary_factor", values["partial_rotary_factor"], "1"
        theta = values.get("rope_theta")
        if kind in THETAS and theta not in (None, THETAS[kind][place]):
            yield "rope_theta", theta, f"{THETAS[kind][place]:.0f}"


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Convert the whole model. The weights keep their type unless --type names another one."""
    program = find_program(NAME)
    assert program is not None  # a problem otherwise
    with whole_model(exportable, path) as folder:
        files = [name for name in FILES if (folder / name).is_file()]
        convert(program, folder, path, weight_type(exportable, options), files, left_out(exportable.config))
    speech = exportable.family == "speech"
    command = f"faster_whisper.WhisperModel({str(path)!r})" if speech else f"ctranslate2.Generator({str(path)!r})"
    window = window_of(exportable)
    limit = (
        () if window is None else (f"right for up to {window:,} tokens: CTranslate2 computes a sliding window wrongly",)
    )
    return Exported(path, exportable.whole, (*limit, f"load it with: {command}"))


def left_out(config: Configuration) -> JsonObject:
    """Settings of the base that the converter does not write: the epsilon of norms, and Llama 3's position scaling."""
    config = complete_config(config)
    rope = config.get("rope_parameters") or {}
    epsilon = next((config[name] for name in EPSILONS if name in config), None)
    return {"epsilon": epsilon, "rope": rope if rope.get("rope_type") == "llama3" else None}


def window_of(exportable: Exportable) -> int | None:
    """The base's sliding window. CTranslate2 ignores it, or computes it wrongly for a longer prompt."""
    return sliding_window(complete_config(exportable.config))


def weight_type(exportable: Exportable, options: Options) -> str:
    """The type from --type, else the type of the base's weights; float32 if CTranslate2 lacks the base's type."""
    stored = exportable.config.get("dtype") or exportable.config.get("torch_dtype")
    return options.type or (stored if stored in TYPES else "float32")


def certify(
    written: Exported, exportable: Exportable, program: Program, questions: Callable[[], Questions], options: Options
) -> Certificate:
    """Compare all log-probabilities with torch's."""
    if exportable.family == "speech":
        recordings = make_recordings(exportable)
        compared, prompts = recordings.questions, recordings.prompts
        answered = speech_answers(program, written.path, compared.rows, prompts, recordings.features)
    else:
        compared = questions().cut(window_of(exportable) or TOKENS)
        answered = answers(program, written.path, compared.rows)
    parts = {weight_type(exportable, options): difference(compared.rows, compared.expected, answered)}
    return Certificate("CTranslate2", program.version, compared.described, parts)
