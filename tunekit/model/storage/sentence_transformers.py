"""The modules of a sentence-transformers folder. Both schemas are read: the one up to version 5.3, and the one since
5.4. The older one is written, because versions since 5.4 read it too, and many programs read only this one."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunekit.basics import JsonObject
from tunekit.contracts import Processor, Tokenizer
from tunekit.errors import ModelError
from tunekit.files.durable import write_json
from tunekit.model.storage.dense_layers import DenseLayer
from tunekit.model.storage.source import KEY, read_json, read_json_list

MODULES, POOLING, PROMPTS = "modules.json", "config.json", "config_sentence_transformers.json"
LENGTH, TOKENIZER = "sentence_bert_config.json", "tokenizer_config.json"
DEFAULT_LENGTH = 512  # for models whose positions are computed and whose tokenizer states no length
TEMPLATE, SIGMOID = "tunekit_template", "torch.nn.modules.activation.Sigmoid"  # of a reranker's settings
JINJA = "chat_template.jinja"
KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
BOOLEANS = {  # the schema up to 5.3: one key for each mode
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
WIDTHS = ("hidden_size", "dim", "d_model", "n_embd")  # keys of config.json for the size of hidden states
OTHERS = "choose a base whose modules are Transformer, Pooling, Dense and Normalize, in this order"


def read_modules(folder: Path) -> JsonObject:
    """The facts of a sentence-transformers folder: `pooling`, the modes whose vectors are put one after another;
    `modules`, the folders of dense layers, if it has any; `normalize`; `prompts`, by name; `max_length`, if it is
    stated. Empty for other folders.

    Raises: ModelError if the folder has other modules (such as Router) or another order of modules, or excludes prompts
    from pooling.
    """
    if not (folder / MODULES).is_file():
        return {}
    modules = read_json_list(folder / MODULES)
    facts: JsonObject = {"normalize": False}
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        path = folder / str(module.get("path", ""))
        if kind not in KNOWN or (kind == "Transformer" and path != folder):
            what = f"has the module {module.get('type')}" + (f" in {path.name}/" if kind in KNOWN else "")
            raise ModelError(f"{what}, which tunekit does not read", OTHERS, file=str(folder / MODULES), key=KEY)
        if kind == "Pooling":
            facts["pooling"] = _pooling(path / POOLING)
        elif kind == "Dense":
            placed = path.parent == folder and path.name.endswith("_Dense")  # as sentence-transformers names it
            if "pooling" not in facts or facts["normalize"] or not placed:
                what = f"Dense must be after Pooling and before Normalize, in N_Dense/, but is {module.get('path')}/"
                raise ModelError(what, OTHERS, file=str(folder / MODULES), key=KEY)
            facts.setdefault("modules", []).append(str(path))
        facts["normalize"] |= kind == "Normalize"
    return {**facts, "prompts": _prompts(folder), **_max_length(folder)}


def _pooling(path: Path) -> list[str]:
    config = read_json(path)
    if not config.get("include_prompt", True):
        raise ModelError("include_prompt is false, but prompts are always pooled here", OTHERS, file=str(path), key=KEY)
    named = config.get("pooling_mode")
    modes = [mode for key, mode in BOOLEANS.items() if config.get(key)]
    if named is not None:
        modes = [named] if isinstance(named, str) else list(named)
    unknown = [mode for mode in modes if mode not in BOOLEANS.values()]
    if unknown or not modes:
        what = f"the pooling mode {unknown[0]!r} is unknown" if unknown else "names no pooling mode"
        raise ModelError(what, f"write one of {', '.join(BOOLEANS.values())}", file=str(path), key=KEY)
    return modes


def _prompts(folder: Path) -> dict[str, str]:
    path = folder / PROMPTS
    prompts = read_json(path).get("prompts") if path.is_file() else None
    return {str(name): str(text) for name, text in (prompts or {}).items() if text}


def _max_length(folder: Path) -> JsonObject:
    """The maximum number of tokens: of sentence_bert_config.json, or else of the tokenizer; empty if neither states
    one."""
    for name, key in ((LENGTH, "max_seq_length"), (TOKENIZER, "model_max_length")):
        value = read_json(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(value, int) and 0 < value < 10**6:
            return {"max_length": value}
    return {}


def read_reranker(folder: Path) -> JsonObject | None:
    """The facts of a CrossEncoder's folder: its `template`, if tunekit wrote one. None for other folders."""
    path = folder / PROMPTS
    stated = read_json(path) if path.is_file() else {}
    if stated.get("model_type") != "CrossEncoder":
        return None
    return {"template": stated[TEMPLATE]} if TEMPLATE in stated else {}


@dataclass(frozen=True)
class FolderProcessor:
    """A tokenizer that also saves the files of a sentence-transformers folder. `facts`: values of the objective."""

    inner: Processor
    facts: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that affects a row."""
        return self.inner.fingerprint

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer for texts."""
        return self.inner.tokenizer

    @property
    def padding(self) -> str | None:
        """The padding token. sentence-transformers cannot pad without it, and some tokenizers' files name none."""
        return None if self.tokenizer is None else self.tokenizer.token_text(self.tokenizer.pad_id)

    def save(self, folder: Path) -> None:
        """Save all files in a model folder that has a config.json."""
        raise NotImplementedError


class EmbeddingProcessor(FolderProcessor):
    """Saves the modules of an embedding model. `facts`: as `read_modules`, with `max_lengths` in place of
    `max_length`."""

    def save(self, folder: Path) -> None:
        """Save the tokenizer and the modules in a model folder that has a config.json."""
        self.inner.save(folder)
        write_modules(folder, self.facts, self.padding)


class RerankerProcessor(FolderProcessor):
    """Saves the settings of a CrossEncoder. `facts`: may contain `template`, which becomes the tokenizer's chat
    template, so that sentence-transformers reads both texts in the same way."""

    def save(self, folder: Path) -> None:
        """Save the tokenizer and the settings in a model folder."""
        self.inner.save(folder)
        _write_tokenizer(folder, self.padding)
        template = {TEMPLATE: self.facts["template"]} if self.facts.get("template") else {}
        if template:
            (folder / JINJA).write_text(pair_template(self.facts["template"]), encoding="utf-8")
            stated = read_json(folder / TOKENIZER)
            write_json(folder / TOKENIZER, {key: value for key, value in stated.items() if key != "chat_template"})
        settings: JsonObject = {
            "model_type": "CrossEncoder",
            "prompts": {},
            "default_prompt_name": None,
            "activation_fn": SIGMOID,
        }
        write_json(folder / PROMPTS, {**settings, **template})


def pair_template(template: str) -> str:
    """The chat template that renders a message of the role query and one of the role document as `template` does."""
    written = {
        f"{{{role}}}": '{%- set content = (messages | selectattr("role", "eq", "' + role + '") | first).content -%}'
        "{{- content if content is string else content[0].text -}}"
        for role in ("query", "document")
    }
    pieces = re.split("({query}|{document})", template)
    return "".join(written.get(piece) or "{{- " + json.dumps(piece) + " -}}" for piece in pieces if piece)


def _write_tokenizer(folder: Path, padding: str | None, **settings: object) -> None:
    """Add settings to the tokenizer's file, and the padding token if it names none."""
    path = folder / TOKENIZER
    stated = read_json(path) if path.is_file() else {}
    named = {} if padding is None or stated.get("pad_token") else {"pad_token": padding}
    write_json(path, {**stated, **named, **settings})


def write_modules(folder: Path, facts: Mapping[str, Any], padding: str | None = None) -> None:
    """Write the modules in the schema up to version 5.3, and the maximum length into the tokenizer's file. `padding`:
    the padding token, for a tokenizer whose file names none."""
    layers = [DenseLayer(Path(path)) for path in facts.get("modules", ())]
    config, names = read_json(folder / "config.json"), ["Transformer", "Pooling", *["Dense"] * len(layers)]
    names += ["Normalize"] if facts["normalize"] else []
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(names) if number)]
    types = [f"sentence_transformers.models.{name}" for name in names]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]
    write_json(folder / MODULES, modules)
    for path in paths[1:]:
        (folder / path).mkdir()
    for path, layer in zip(paths[2:], layers, strict=False):
        layer.save(folder / path)
    width = next((config[key] for key in WIDTHS if key in config), None)
    pooling = {key: mode in facts["pooling"] for key, mode in BOOLEANS.items()}
    write_json(folder / paths[1] / POOLING, {"word_embedding_dimension": width, **pooling, "include_prompt": True})
    known = _max_length(folder).get("max_length") or config.get("max_position_embeddings") or DEFAULT_LENGTH
    length = max(facts["max_lengths"].values(), default=known)
    write_json(folder / LENGTH, {"max_seq_length": length, "do_lower_case": False})
    _write_tokenizer(folder, padding, model_max_length=length)
    similarity = {"prompts": facts["prompts"], "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / PROMPTS, similarity)
