"""Rules about other programs: which settings in a model folder's small files a program reads wrongly or refuses.

Each rule was tested with the program, or read in the source of the version named here. No code in the folder is
executed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from tunekit.model.storage import mlx_lm, supported
from tunekit.model.storage.portable import (
    BY_LAYER_TYPE,
    RENAMED,
    SAME_TOKENIZER,
    TEMPLATE,
    ModelFiles,
    all_parts,
    needs_n_ctx,
    older_rope,
    portable,
    untagged,
)

Rule = Callable[[ModelFiles], Iterator[str]]
Support = Callable[[ModelFiles], str | None]  # why a program does not support the model
# Tokenizer classes of transformers 5.24 that 4.57 does not know
NEWER_TOKENIZERS = {
    *SAME_TOKENIZER,
    *("SentencePieceBackend", "PythonBackend", "MistralCommonBackend", "EsmcTokenizer", "LasrTokenizer"),
    *("Qwen3_5Tokenizer", "Siglip2Tokenizer", "VideoPrismTokenizer"),
}
# Defaults of transformers 4.57's configuration classes for the older keys of rope_parameters
THETA = 10_000.0
OLDER_DEFAULTS = {
    "rotary_emb_base": THETA,
    "rope_local_base_freq": THETA,
    "local_rope_theta": THETA,
    "global_rope_theta": 160_000.0,
    "partial_rotary_factor": 1.0,
}
PARTIAL = {  # transformers 4.57's defaults of partial_rotary_factor (or rotary_pct), if not 1
    **dict.fromkeys(
        ("fuyu", "glm", "glm4", "glm4_moe", "glm4v_moe_text", "nemotron", "persimmon", "phi", "recurrent_gemma"), 0.5
    ),
    **dict.fromkeys(("gpt_neox", "qwen3_next", "stablelm"), 0.25),
    "moonshine": 0.9,
}


@dataclass(frozen=True)
class Finding:
    """One reason why a program reads a folder wrongly or refuses it. `mendable`: whether `write_portable_copy` solves
    the problem. `limit`: whether the problem occurs only for some text lengths."""

    program: str
    what: str
    mendable: bool
    limit: bool = False


@dataclass(frozen=True)
class FolderReading:
    """The problems of one program with a model folder. `unsupported`: why the program cannot run the model at all; None
    if it can."""

    program: str
    version: str
    unsupported: str | None
    findings: tuple[Finding, ...]


def readings(files: ModelFiles) -> list[FolderReading]:
    """The problems that each known program has with a folder of these files."""
    mended, results = portable(files), []
    for name, (its_version, support, rules) in PROGRAMS.items():
        unsupported = support(files)
        remaining = {what for rule in rules for what in rule(mended)}
        whats = [] if unsupported else [what for rule in rules for what in rule(files)]
        findings = [Finding(name, what, what not in remaining) for what in whats]
        if name == "mlx-lm" and not unsupported:
            findings += [Finding(name, what, mendable=False, limit=True) for what in mlx_lm.limits(files.config)]
        results.append(FolderReading(name, its_version, unsupported, tuple(findings)))
    return results


def _type_in(names: Callable[[], frozenset[str]]) -> Support:
    """Make a check for programs that choose their code by model_type. It returns why the model is unsupported, or
    None."""

    def support(files: ModelFiles) -> str | None:
        kind = str(files.config.get("model_type"))
        code = ", and doctor does not run the folder's own code" if "auto_map" in files.config else ""
        return None if kind in names() else f"does not know the model type {kind}{code}"

    return support


def _architecture_in(names: frozenset[str], *, text_part: bool = False) -> Support:
    """Make a check for programs that choose their code by the first architecture. It returns why the model is
    unsupported, or None. `text_part`: the program uses the architecture in text_config, if one is named there."""

    def support(files: ModelFiles) -> str | None:
        text = files.config.get("text_config") if text_part else None
        inner = text.get("architectures") if isinstance(text, Mapping) else None
        name = str(inner[0]) if isinstance(inner, list) and inner else files.architecture
        return None if name in names else f"does not know the architecture {name or '(none is named)'}"

    return support


def _every_model(files: ModelFiles) -> str | None:
    return None


def _installed_types() -> frozenset[str]:
    from transformers import CONFIG_MAPPING

    return frozenset(CONFIG_MAPPING.keys())


def _other_rope(
    place: str, part: Mapping[str, Any], defaults: Mapping[str, float], keys: tuple[str, ...]
) -> Iterator[str]:
    """A message for a program that reads only the older `keys` instead of rope_parameters, if it would therefore use
    other values."""
    wrong = []
    for key, value in older_rope(part).items():
        if key in keys and part.get(key, defaults.get(key)) != value:
            instead = part.get(key, defaults.get(key))
            wrong.append(f"without {key}" if isinstance(value, Mapping) else f"with {key} {instead} instead of {value}")
    if wrong:
        yield f"{place}rope_parameters is not read, so the model is computed {' and '.join(wrong)}"


def _older_rope_of_transformers_4(files: ModelFiles) -> Iterator[str]:
    for place, part in all_parts(files.config):
        kind = str(part.get("model_type"))
        theta, share = supported.TRANSFORMERS_4_THETA.get(kind, THETA), PARTIAL.get(kind, 1.0)
        defaults = {**OLDER_DEFAULTS, "rope_theta": theta, "partial_rotary_factor": share, "rotary_pct": share}
        if kind == "modernbert-decoder":
            defaults["local_rope_theta"] = defaults["global_rope_theta"]
        keys = ("rope_theta", "rope_scaling", *OLDER_DEFAULTS)
        if kind.startswith("gpt_neox"):
            keys = ("rotary_emb_base", "rotary_pct", "rope_scaling")
        yield from _other_rope(place, part, defaults, keys)


def _rope_of_mlx(files: ModelFiles) -> Iterator[str]:
    for place, part in all_parts(files.config):
        kind = str(part.get("model_type"))
        if kind in supported.MLX_LM_OWN_THETA:
            defaults = {"rope_theta": supported.MLX_LM_OWN_THETA[kind], "rope_local_base_freq": THETA}
            yield from _other_rope(place, part, defaults, ("rope_theta", "rope_local_base_freq", "rope_scaling"))
        missing = [key for key in ("rope_theta", "rotary_emb_base") if key in older_rope(part) and key not in part]
        if kind in supported.MLX_LM_NEEDS_THETA and missing:
            yield f"the model is refused: mlx-lm's {kind} needs {place}{missing[-1]}, and does not read rope_parameters"


def _length_of_mlx(files: ModelFiles) -> Iterator[str]:
    if needs_n_ctx(files.config):
        yield "the model is refused: mlx-lm's gpt2 needs n_ctx, the older name of n_positions"


def _others_of_mlx(files: ModelFiles) -> Iterator[str]:
    yield from mlx_lm.cannot(files.config)
    if files.prefixed:
        yield (
            "the model is refused: mlx-lm's gpt2 reads tensors with names such as h.0.attn.c_attn.weight, but the "
            "base's names begin with transformer."
        )


def _one_frequency(files: ModelFiles) -> Iterator[str]:
    """A message for programs that use one rotary base frequency for all layers, if the model's layer types have
    different base frequencies."""
    for place, part in all_parts(files.config):
        keys = next(
            (keys for start, keys in BY_LAYER_TYPE.items() if str(part.get("model_type")).startswith(start)), None
        )
        rope = part.get("rope_parameters")
        if keys is None or keys[1] is not None or not isinstance(rope, Mapping):
            continue
        each = [rope.get(name) for name in ("full_attention", "sliding_attention")]
        full, sliding = (one.get("rope_theta") if isinstance(one, Mapping) else None for one in each)
        if full != sliding and sliding is not None:
            yield f"all layers are computed with one rope_theta, but {place}rope_parameters has {full} and {sliding}"


def _rope_of_ollama(files: ModelFiles) -> Iterator[str]:
    theta = supported.OLLAMA_OWN_THETA.get(files.architecture)
    if theta is not None:
        defaults = {"rope_theta": theta, "rope_local_base_freq": THETA}
        for place, part in all_parts(files.config):
            yield from _other_rope(place, part, defaults, ("rope_theta", "rope_local_base_freq", "rope_scaling"))


def _renamed(files: ModelFiles) -> Iterator[str]:
    """Messages for keys that transformers 5 writes under a new name. transformers 4 does not know the new name, and
    uses its defaults."""
    for place, part in all_parts(files.config):
        for old, new in RENAMED.get(str(part.get("model_type")), {}).items():
            if old == "num_experts" and new in part and old not in part:
                yield f"{place}{new}, the newer name of {old}, is not read"


def _newer_tokenizer(files: ModelFiles) -> Iterator[str]:
    name = str(files.tokenizer.get("tokenizer_class"))
    if name in NEWER_TOKENIZERS:
        yield f"the tokenizer is refused: its class {name} is unknown"
    if isinstance(files.tokenizer.get("extra_special_tokens"), list):
        yield "the tokenizer is refused: extra_special_tokens is a list, but must be a mapping"


def _tagged_numbers(files: ModelFiles) -> Iterator[str]:
    for place, part in all_parts(files.config):
        for key, value in part.items():
            if untagged(value) != value:
                yield f"{place}{key} is read as {value}, which is not a number"


def _endless(files: ModelFiles) -> Iterator[str]:
    """A message if generation_config.json names no end token. No message if its settings were derived from config.json,
    because programs then derive them again while loading."""
    settings = files.generation
    named = settings.get("eos_token_id") is not None or settings.get("_from_model_config")
    if settings and files.generates and not named and files.eos_ids is not None:
        yield "generation does not stop: generation_config.json has no eos_token_id"


def _no_padding(files: ModelFiles) -> Iterator[str]:
    if files.tokenizer and files.tokenizer.get("pad_token") is None and not files.special.get("pad_token"):
        yield "a batch of texts cannot be padded: tokenizer_config.json has no pad_token"


def _template_of_ollama(files: ModelFiles) -> Iterator[str]:
    if files.template is not None and files.own_template is None:
        yield f"the chat template is not found: it is in {TEMPLATE}, but Ollama reads only tokenizer_config.json"
    yield from _other_template(files)


def _other_template(files: ModelFiles) -> Iterator[str]:
    both = files.own_template is not None and files.template is not None
    if both and files.own_template != files.template:
        yield f"the chat template in tokenizer_config.json is used, although {TEMPLATE} has a different one"


def _packed(files: ModelFiles) -> Iterator[str]:
    stored = files.config.get("quantization_config")
    if isinstance(stored, dict) and stored.get("quant_method") == "bitsandbytes":
        yield "weights packed by bitsandbytes are refused; merge with --onto dequantized"


_ANSWERS = (_endless, _no_padding)
_MLX = (_rope_of_mlx, _length_of_mlx, _one_frequency, _others_of_mlx, _packed)
_TRANSFORMERS_4 = (
    _older_rope_of_transformers_4,
    _one_frequency,
    _renamed,
    _newer_tokenizer,
    _tagged_numbers,
    *_ANSWERS,
)
PROGRAMS: dict[str, tuple[str, Support, tuple[Rule, ...]]] = {
    "transformers 4": ("4.57.6", _type_in(lambda: supported.TRANSFORMERS_4), _TRANSFORMERS_4),
    "transformers 5": (version("transformers"), _type_in(_installed_types), _ANSWERS),
    "mlx-lm": ("0.32.2", _type_in(lambda: supported.MLX_LM), _MLX),
    "Ollama": (
        "2026-08-21",
        _architecture_in(supported.OLLAMA),
        (_rope_of_ollama, _one_frequency, _template_of_ollama),
    ),
    "llama.cpp's converter": (
        "2026-08",
        _architecture_in(supported.LLAMA_CPP, text_part=True),
        (_one_frequency, _other_template, _packed),
    ),
    "vLLM": ("0.32.0", _every_model, ()),  # reads both spellings; runs unknown models through transformers
    "ONNX (optimum)": ("0.1.0", _type_in(lambda: supported.OPTIMUM), _TRANSFORMERS_4),  # on transformers 4
}
