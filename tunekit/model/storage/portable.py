"""Makes a model folder readable by older programs: transformers 4, mlx-lm, Ollama.

transformers 5 writes rotary settings only as `rope_parameters`, and the chat template only into a separate file. A
program that reads only the older keys and files would silently compute other logits, or render other prompts.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunekit.errors import ModelError
from tunekit.files.untrusted import MODEL_FILE, read_small
from tunekit.model.storage.shards import read_headers
from tunekit.model.storage.source import read_json
from tunekit.records import JsonObject

# keys of rope_parameters that older configurations have at the top level
TOP_LEVEL_KEYS = ("rope_theta", "partial_rotary_factor")
OTHER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# Models whose layer types differ: the older keys for the base frequencies of full and of sliding attention. Older
# programs know no other such models.
BY_LAYER_TYPE = {
    "gemma3": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),  # a single frequency; only full attention is scaled
}
# The only keys that transformers 4 accepts in these models' rope_scaling; None: all of rope_parameters
ONLY_TYPE = {
    **dict.fromkeys(("phi3", "phi4_multimodal"), ("short_factor", "long_factor")),
    **dict.fromkeys(("chameleon", "olmo", "olmo2", "phimoe"), None),
}
# For each model type: an older key that transformers 4 or mlx-lm requires, and the newer key with the same value
RENAMED = {
    "lfm2": {"block_dim": "hidden_size"},
    **{kind: {"num_experts": "num_local_experts"} for kind in ("mellum", "qwen3_moe", "qwen3_vl_moe_text")},
}
# Keys of older configurations with the value that newer code always uses; and types whose head_dim newer code computes
CONSTANT = {"apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True}}
HEAD_DIM = frozenset({"exaone4", "exaone_moe", "glm4_moe", "mellum", "qwen3_moe", "qwen3_vl_moe_text"})
# Types for which mlx-lm reads sliding_window_pattern instead of layer_types: a number, here with its default, or
# letters
PERIODS = {"gemma3_text": 6, "cohere2": 4}
LETTERS = frozenset({"exaone4"})
SAME_TOKENIZER = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # the name that transformers 4 knows
TAGGED_NUMBERS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}  # {"__float__": "NaN"}
# endings of class names of models that generate text
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Keys that transformers reads from config.json if there is no generation_config.json
GENERATION_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id"),
    *("forced_eos_token_id", "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("remove_invalid_values", "exponential_decay_length_penalty"),
)
CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class ModelFiles:
    """The content of the small files in a model folder, which state how to use its weights. A missing file is an empty
    object, or None."""

    config: JsonObject
    tokenizer: JsonObject
    generation: JsonObject
    template: str | None  # chat_template.jinja
    special: JsonObject  # special_tokens_map.json
    ids: Mapping[str, int]  # special token -> id
    prefixed: bool = False  # GPT-2: whether the tensors' names begin with "transformer."; the hub's do not

    @property
    def architecture(self) -> str:
        """The name of the model's class; empty if none is named."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return self.architecture.endswith(GENERATES)

    @property
    def own_template(self) -> str | None:
        """The chat template in tokenizer_config.json; if there are several, the template named default."""
        template = self.tokenizer.get("chat_template")
        named = template if isinstance(template, list) else []
        texts = [each.get("template") for each in named if isinstance(each, dict) and each.get("name") == "default"]
        text = template if isinstance(template, str) else next(iter(texts), None)
        return text if isinstance(text, str) and text else None

    @property
    def pad_token(self) -> str | None:
        """The padding token: the token that the files name by text, otherwise the token that they name by id, otherwise
        the end token of a model that generates text."""
        texts = {number: text for text, number in self.ids.items()}
        numbers = (self.generation.get("pad_token_id"), self.config.get("pad_token_id"))
        by_id = [texts[number] for number in numbers if isinstance(number, int) and number in texts]
        return (
            self._named("pad_token")
            or next(iter(by_id), None)
            or (self._named("eos_token") if self.generates else None)
        )

    @property
    def eos_ids(self) -> int | list[int] | None:
        """The ids of the tokens that end an answer."""
        text_config = self.config.get("text_config")
        places = (self.generation, self.config, text_config if isinstance(text_config, dict) else {})
        stated = [place["eos_token_id"] for place in places if place.get("eos_token_id") is not None]
        return next(iter(stated), None) if stated else self.ids.get(self._named("eos_token") or "")

    def _named(self, key: str) -> str | None:
        """The text of the special token `key`, if the tokenizer's files name one."""
        for place in (self.tokenizer, self.special):
            token = place.get(key)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                return text
        return None


def read_model_files(folder: Path) -> ModelFiles:
    """Read the small files of a model folder. Raises: ModelError for a damaged file."""
    names = (CONFIG, TOKENIZER, GENERATION, "special_tokens_map.json")
    config, tokenizer, generation, special = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in names
    )
    path = folder / TEMPLATE
    template = read_small(path, MODEL_FILE).decode("utf-8", "replace") if path.is_file() else ""
    prefixed = False
    with suppress(ModelError):  # the weights' own reader reports that
        prefixed = config.get("model_type") == "gpt2" and any(map(_is_prefixed, read_headers(folder)))
    return ModelFiles(
        config, tokenizer, generation, template or None, special, _special_ids(folder, tokenizer), prefixed
    )


def _is_prefixed(name: str) -> bool:
    return name.startswith("transformer.")


def _special_ids(folder: Path, tokenizer: JsonObject) -> dict[str, int]:
    """The ids of the special tokens by their text. transformers 5 writes these ids only into tokenizer.json."""
    decoder, path = tokenizer.get("added_tokens_decoder"), folder / "tokenizer.json"
    tokens: object = []
    if isinstance(decoder, dict) and decoder:
        tokens = [
            {**token, "id": int(number)}
            for number, token in decoder.items()
            if number.isdecimal() and isinstance(token, dict)
        ]
    elif path.is_file():
        with suppress(ModelError):  # the tokenizer's own reader reports that
            tokens = read_json(path).get("added_tokens")
    known = [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []
    pairs = [(token.get("content"), token.get("id")) for token in known]
    return {text: number for text, number in pairs if isinstance(text, str) and isinstance(number, int)}


def make_portable(folder: Path) -> None:
    """Rewrite the folder's small files (configuration, tokenizer's configuration, generation settings, chat template)
    in the form that older and newer programs read."""
    files = read_model_files(folder)
    mended = portable(files)
    for name, old, new in (
        (CONFIG, files.config, mended.config),
        (TOKENIZER, files.tokenizer, mended.tokenizer),
        (GENERATION, files.generation, mended.generation),
    ):
        if old != new:
            (folder / name).write_text(json.dumps(new, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if mended.template is not None and mended.template != files.template:
        (folder / TEMPLATE).write_text(mended.template, encoding="utf-8")


def portable(files: ModelFiles) -> ModelFiles:
    """The same files, with every setting also under the older keys and in the other files where a supported program
    reads it."""
    generation = _generation(files)
    tokenizer = _older_tokenizer(files)
    template = files.template
    if template is None and isinstance(
        tokenizer.get("chat_template"), str
    ):  # not for several templates: the file would hide all but one
        template = files.own_template
    return replace(
        files, config=with_older_keys(files.config), tokenizer=tokenizer, generation=generation, template=template
    )


def _generation(files: ModelFiles) -> JsonObject:
    """The generation settings, completed with the ids of the end token and the padding token. If generation_config.json
    exists, transformers does not read these ids from config.json."""
    eos, generation = files.eos_ids, files.generation
    if eos is None or not (files.generates or generation):
        return generation
    if not generation:
        generation = {key: files.config[key] for key in GENERATION_KEYS if files.config.get(key) is not None}
    added = {"eos_token_id": eos, "pad_token_id": files.ids.get(files.pad_token or "")}
    missing = {key: value for key, value in added.items() if generation.get(key) is None and value is not None}
    return {**generation, **missing}


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, also its nested parts, with additional older keys: `torch_dtype` for `dtype`; `rope_theta`,
    `rope_scaling` and others for `rope_parameters`; GPT-2's `n_ctx`; and other keys that older programs require."""
    parts = {name: with_older_keys(part) for name, part in config_parts(config)}
    dtype = {"torch_dtype": config["dtype"]} if isinstance(config.get("dtype"), str) else {}
    numbers = {name: untagged(value) for name, value in config.items()}
    length = {"n_ctx": config["n_positions"]} if needs_n_ctx(config) else {}
    return {**numbers, **parts, **dtype, **length, **_required_keys(config), **older_rope(config)}


def _required_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that older programs require but the configuration lacks, with values computed from its other keys."""
    kind, kinds = str(config.get("model_type")), config.get("layer_types")
    required = {old: config[new] for old, new in RENAMED.get(kind, {}).items() if new in config}
    required |= CONSTANT.get(kind, {})
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if kind in HEAD_DIM and isinstance(width, int) and isinstance(heads, int) and heads:
        required["head_dim"] = width // heads
    expand = config.get("expand", 2)
    if kind == "mamba2" and isinstance(width, int) and isinstance(expand, int | float):
        required["intermediate_size"] = int(expand * width)
    required = {key: value for key, value in required.items() if config.get(key) is None}
    period = period_of(kinds) if isinstance(kinds, list) and kind in PERIODS else None
    if period not in (None, config.get("sliding_window_pattern", PERIODS.get(kind))):
        required["sliding_window_pattern"] = period
    if kind in LETTERS and isinstance(kinds, list) and isinstance(config.get("sliding_window_pattern"), int):
        letters = "".join("L" if each == "sliding_attention" else "G" for each in kinds)
        required["sliding_window_pattern"] = letters if "L" in letters else None
    return required


def period_of(layer_types: list[Any]) -> int | None:
    """The number N if every Nth layer has full attention and the other layers have a sliding window; otherwise None."""
    full = [each != "sliding_attention" for each in layer_types]
    period = full.index(True) + 1 if True in full else 0
    return period if period and full == [(index + 1) % period == 0 for index in range(len(full))] else None


def needs_n_ctx(config: Mapping[str, Any]) -> bool:
    """Whether this is a GPT-2 configuration that lacks `n_ctx`, the older name of n_positions. mlx-lm requires
    `n_ctx`."""
    return config.get("model_type") == "gpt2" and "n_positions" in config and "n_ctx" not in config


def config_parts(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The nested configurations of a model's components, such as text_config, each with its key."""
    parts = [(name, value) for name, value in config.items() if isinstance(value, Mapping)]
    return [
        (name, part)
        for name, part in parts
        if (name.endswith("_config") or "model_type" in part) and name != "quantization_config"
    ]


def all_parts(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configuration and its nested configurations, each with the prefix of its keys."""
    yield place, config
    for name, part in config_parts(config):
        yield from all_parts(part, f"{place}{name}.")


def untagged(value: object) -> object:
    """Replace {"__float__": "Infinity"}, the form in which transformers 5 writes special numbers, by the number itself,
    also inside lists."""
    if isinstance(value, list):
        return [untagged(each) for each in value]
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return TAGGED_NUMBERS.get(str(value["__float__"]), value)
    return value


def older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The older keys with the values of `rope_parameters`. Empty if the configuration has `rope_scaling`, which
    transformers 5 reads first."""
    rope, kind = config.get("rope_parameters"), str(config.get("model_type"))
    if not isinstance(rope, Mapping) or config.get("rope_scaling") or rope.get("rope_type") == "axial":
        return {}  # image encoders use axial; older programs have no key for it
    if "rope_theta" in rope:
        names = next((names for start, names in OTHER_NAMES.items() if kind.startswith(start)), {})
        older = {key: rope[key] for key in TOP_LEVEL_KEYS if key in rope}
        return {**older, **{names[key]: value for key, value in older.items() if key in names}, **_scaling(rope, kind)}
    keys = next((keys for start, keys in BY_LAYER_TYPE.items() if kind.startswith(start)), None)
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if keys is None or not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        return {}
    scaling = _scaling(full, kind) if keys[0] == "rope_theta" else {}  # ModernBERT would apply it to both
    older = {keys[0]: full.get("rope_theta"), **scaling}
    return older if keys[1] is None else {**older, keys[1]: sliding.get("rope_theta")}


def _scaling(rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The older key `rope_scaling`. Its value is None if there is no scaling. Otherwise it contains the type, under the
    names that older programs read, and the numbers."""
    numbers = {key: value for key, value in rope.items() if key not in (*TOP_LEVEL_KEYS, "rope_type", "type")}
    scaling_type = rope.get("rope_type", "default")
    if scaling_type == "default" and not numbers:
        return {"rope_scaling": None}
    if kind not in ONLY_TYPE:
        return {"rope_scaling": {"rope_type": scaling_type, "type": scaling_type, **numbers}}
    known = ONLY_TYPE[kind] or tuple(numbers)
    return {"rope_scaling": {"type": scaling_type, **{key: numbers[key] for key in known if key in numbers}}}


def _older_tokenizer(files: ModelFiles) -> JsonObject:
    """The tokenizer's configuration, with class, special tokens, padding token and chat template in the form that every
    version reads."""
    if not files.tokenizer:
        return {}
    tokenizer = {**files.tokenizer}
    name = str(tokenizer.get("tokenizer_class"))
    if name in SAME_TOKENIZER:
        tokenizer["tokenizer_class"] = SAME_TOKENIZER[name]
    if isinstance(tokenizer.get("extra_special_tokens"), list):  # transformers 4 reads a mapping under this name
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    if tokenizer.get("pad_token") is None and files.pad_token is not None:
        tokenizer["pad_token"] = files.pad_token
    if files.template is not None and files.template != files.own_template:
        several, default = tokenizer.get("chat_template"), {"name": "default", "template": files.template}
        if isinstance(several, list):
            several = [default, *(each for each in several if isinstance(each, dict) and each.get("name") != "default")]
        tokenizer["chat_template"] = several if isinstance(several, list) else files.template
    return tokenizer
