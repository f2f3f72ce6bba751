"""Reads facts from a base's files (family, labels, fingerprint), and refuses unusable bases before weights are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tunekit.errors import ModelError
from tunekit.files.tensors import read_raw_header
from tunekit.files.untrusted import MODEL_FILE, sha256_of
from tunekit.model.families import Family, known_families, make_family
from tunekit.model.storage.quantized_layouts import METHODS, stored_settings
from tunekit.model.storage.sentence_transformers import read_modules, read_reranker
from tunekit.model.storage.shards import shard_files
from tunekit.model.storage.source import DENSE, KEY, ModelSource, find_source, read_json
from tunekit.recipe.model import HeadedModel, HeadlessModel, ModelSection
from tunekit.records import JsonObject

CHUNK_BYTES = 64 * 1024
SAMPLED_CHUNKS = 16
GGUF_HEAD_BYTES = 2**20
# Keys that change when a model is saved again, although the model does not.
VOLATILE = (
    *("_name_or_path", "transformers_version", "_diffusers_version"),
    *("torch_dtype", "dtype", "use_cache", "_attn_implementation"),
)
OTHER_HEADS = {
    "ForMaskedLM": "it is a masked language model, which fills gaps and does not continue text",
    "ForQuestionAnswering": "it is a question-answering model",
    "ForSpeechSeq2Seq": "it is a speech model",
    "ForCTC": "it is a speech model",
    "ForPreTraining": "it is a model with pre-training heads",
}
# The end of a folder's name that states how its weights are quantized, as in Qwen2.5-7B-Instruct-GPTQ-Int4
QUANTIZED_NAME = re.compile(
    r"[-_.](?:awq|gptq|fp8|fp4|nvfp4|mxfp4|int[48]|w\d+a\d+|bnb|exl[23]|mlx|[2-8]bit|quantized)\b.*", re.IGNORECASE
)
CHOICES = "choose a causal language model, an encoder-decoder such as T5, BART or Whisper, or a classifier"


def read_config(source: ModelSource) -> JsonObject:
    """The content of a model folder's config.json.

    Raises: ModelError if it is missing or damaged, or if the folder is an adapter or a run.
    """
    if (source.folder / "adapter_config.json").exists():
        how = "name the adapter's base model here; to continue the adapter, name it in adapter.init_from"
        raise ModelError(f"{source.name_or_path} contains an adapter, not a base model", how, key=KEY)
    if (source.folder / "plan.json").exists() and (source.folder / "recipe.yaml").exists():
        command = f"tunekit merge {shlex.quote(source.name_or_path)} --output FOLDER"
        how = f"merge the run, and name the merged folder: {command}"
        raise ModelError(f"{source.name_or_path} is a run, not a base model", how, key=KEY)
    if not (source.folder / "config.json").exists() and not any(source.folder.glob("*.safetensors")):
        ggufs = sorted(path.name for path in source.folder.glob("*.gguf"))
        if ggufs:
            how = f"name the file itself, for example {source.folder / ggufs[0]}"
            raise ModelError(f"{source.name_or_path} contains GGUF files", how, key=KEY)
        if indexed := indexed_family(source):
            what = f"{source.name_or_path} is {indexed.text}, but this objective trains models of another kind"
            raise ModelError(what, "write objective: dreambooth, or choose another base", key=KEY)
    return read_json(source.folder / "config.json")


def indexed_family(source: ModelSource) -> Family | None:
    """The family of a base that has an index file instead of config.json, such as a pipeline's model_index.json."""
    families = () if source.gguf_file is not None else known_families()
    indexed = (family for family in families if family.index_file)
    return next((family for family in indexed if (source.folder / str(family.index_file)).exists()), None)


def unnamed_family() -> Family:
    """The family of a base whose files do not name an architecture, such as a GGUF file."""
    return next(family for family in known_families() if family.recognises("", {}))


def head_labels(source: ModelSource, family: str) -> tuple[str, ...]:
    """Labels of a classifier's head, from the base's configuration; empty if the base belongs to a different family."""
    raw = {} if source.gguf_file is not None else read_config(source)
    endings = make_family(family).endings
    if not any(str(name).endswith(endings) for name in raw.get("architectures") or ()):
        return ()
    names = raw.get("id2label")
    names = names if isinstance(names, dict) else {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names.get(str(number))) for number in range(len(names)))


def find_family(config: JsonObject, section: ModelSection) -> Family:
    """Find the family of a base from the architecture in its configuration. `model.family` must be auto or the same
    family.

    Raises: ModelError with the reason if no family fits.
    """
    requested = None if section.family == "auto" else make_family(section.family)
    if requested is not None and requested.index_file is not None:
        what = f"{section.name_or_path} is not {requested.text}: it contains no {requested.index_file}"
        raise ModelError(what, "name a folder that contains this file", key=KEY)
    name = f"{section.name_or_path} ({config.get('model_type', 'unknown')})"
    architectures = config.get("architectures") or []
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    family = next((family for family in known_families() if family.recognises(architecture, config)), None)
    reason = _obstacle(config, architecture, family, requested, isinstance(section, HeadedModel | HeadlessModel))
    if reason:
        raise ModelError(f"{name} cannot be loaded: {reason}", CHOICES, key=KEY)
    if requested is not None and isinstance(section, HeadedModel | HeadlessModel):
        return requested
    assert family is not None
    if requested not in (None, family):
        what = f"{name} belongs to the family {family.name} by its architecture {architecture or '(none named)'}"
        how = "write family: auto, or choose another base"
        raise ModelError(f"{what}, but model.family is {section.family}", how, key="model.family")
    return family


def _obstacle(
    config: JsonObject, architecture: str, family: Family | None, requested: Family | None, headed: bool
) -> str | None:
    """The reason why a base cannot be loaded; None if there is none."""
    if headed and family is not None and family.trained_as is not None:
        return f"it is {family.text}, and this objective needs a model with a head for labels"
    if family is None and not headed:
        known = (text for ending, text in OTHER_HEADS.items() if architecture.endswith(ending))
        return next(known, f"its architecture {architecture} has no head for this objective, or is unknown")
    loaded_as = requested if headed else family
    return loaded_as.obstacle(config) if loaded_as is not None else None


def family_of_base(section: ModelSection) -> str:
    """The name of a base's family, from its files. If they do not identify a family, the name is causal, and an error
    follows when the base is loaded."""
    source = find_source(section, weights=False)
    family = indexed_family(source)
    if family is None and source.gguf_file is None and (source.folder / "config.json").exists():
        with suppress(ModelError):
            family = find_family(read_json(source.folder / "config.json"), section)
    return (family or unnamed_family()).name


def base_objective(section: ModelSection) -> JsonObject:
    """The objective that a base's files state: that of embeddings or of rerankers, for a folder of
    sentence-transformers, with the facts of its modules. Empty for other bases. Raises: ModelError if such a folder has
    modules that are not read."""
    source = find_source(section, weights=False)
    if not source.gguf_file and (reranker := read_reranker(source.folder)) is not None:
        return {"method": "rerank", **reranker}
    facts = {} if source.gguf_file else read_modules(source.folder)
    return {"method": "embed", **facts} if "pooling" in facts else {}


def with_layers(facts: JsonObject, section: ModelSection) -> JsonObject:
    """The saved facts of an objective, with the folders of the base's dense layers if the facts name such layers."""
    return {**facts, "modules": base_objective(section).get("modules", ())} if "dense" in facts else facts


def read_answer_start(source: ModelSource, section: ModelSection) -> int | None:
    """The id of the token with which an encoder-decoder starts its answer. None for other bases, or if the files do not
    name this token."""
    path = source.folder / "config.json"
    if source.gguf_file is not None or not path.exists():
        return None
    config, newer = read_json(path), source.folder / "generation_config.json"
    try:
        if not find_family(config, section).reads_source:
            return None
    except ModelError:  # reported when the base is loaded
        return None
    named = [read_json(newer)] if newer.exists() else []
    tokens = [values.get("decoder_start_token_id") for values in (*named, config)]
    return next((value for value in tokens if isinstance(value, int)), None)


def is_packed_by_bitsandbytes(config: JsonObject) -> bool:
    """Whether the files contain weights that bitsandbytes packed to 4 bits, such as after a merge with --onto
    quantized."""
    stored = stored_settings(config) or {}
    return bool(stored.get("load_in_4bit") or stored.get("_load_in_4bit"))


def stored_method(config: JsonObject, section: ModelSection) -> str | None:
    """The name of the method by which the weights in the files are quantized; None if they are dense.

    Raises: ModelError for a method that tunekit cannot dequantize. The message depends on model.quantization.
    """
    stored = stored_settings(config)
    if stored is None:
        return None
    method = str(stored.get("quant_method", "unknown"))
    if method in METHODS:
        return method
    plain = QUANTIZED_NAME.sub("", section.name_or_path)
    sibling = "choose the unquantized base" + (f", by its name {plain}" if plain != section.name_or_path else "")
    if section.quantization != "none":
        conflict = f"so model.quantization cannot quantize it again to {section.quantization}"
        what = f"{section.name_or_path} is quantized already ({method}), {conflict}"
        raise ModelError(what, sibling, key="model.quantization")
    what = f"{section.name_or_path} has quantized weights ({method}), which tunekit does not load"
    raise ModelError(what, f"{sibling}, and set model.quantization to quantize it while it is loaded", key=KEY)


def fingerprint(source: ModelSource) -> str:
    """sha256 of the base: configuration, every file's header and size, and samples of the files' data.

    The same files give the same value in any folder. A change of data outside the samples is not detected.
    """
    digest = hashlib.sha256()
    if source.gguf_file is not None:
        _digest_samples(digest, source.folder / source.gguf_file, 0, GGUF_HEAD_BYTES)
        return digest.hexdigest()
    if indexed_family(source) is not None:
        for path in sorted(source.folder.glob("*/config.json")):
            digest.update(path.parent.name.encode())
            _digest_folder(digest, read_json(path), sorted(path.parent.glob("*.safetensors")))
    else:
        _digest_folder(digest, read_config(source), [source.folder / name for name in shard_files(source.folder)])
        for path in sorted(source.folder.glob(DENSE)):
            _digest_folder(digest, read_json(path.with_name("config.json")), [path])
    return digest.hexdigest()


def remote_code(section: ModelSection, key: str = "model") -> dict[str, str]:
    """The sha256 of the Python files in the folder of a base with remote code, and in the hub repositories whose code
    the base uses, without hidden folders and installed packages, by the recipe's key; empty for other bases. `key`: the
    section's place in the recipe."""
    if not section.trust_remote_code:
        return {}
    source, digest = find_source(section, weights=False), hashlib.sha256()
    others = [{"name_or_path": name, "revision": "main"} for name in code_repositories(source.folder)]
    for other in [{}, *others]:
        digest.update(other.get("name_or_path", "").encode())
        folder = find_source(section.model_copy(update=other), weights=False).folder
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder)
            if not any(part.startswith(".") or part == "site-packages" for part in name.parts):
                digest.update(f"{name.as_posix()} {sha256_of(path, MODEL_FILE)}\n".encode())
    return {f"{key}.trust_remote_code": digest.hexdigest()}


def code_repositories(folder: Path) -> list[str]:
    """The hub repositories that the `auto_map` of a model folder names: in `org/code--module.Class`, it is org/code."""
    named = set[str]()
    for path in sorted(folder.glob("*config.json")):
        mapped = read_json(path).get("auto_map")
        for classes in mapped.values() if isinstance(mapped, dict) else ():
            for name in classes if isinstance(classes, list) else [classes]:
                repository, separator, _ = str(name).partition("--")
                named |= {repository} if separator else set()
    return sorted(named)


def _digest_folder(digest: hashlib._Hash, config: JsonObject, files: Sequence[Path]) -> None:
    """Add the configuration (without keys that change when a model is saved again), and the headers and samples of
    files, to the digest."""
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    digest.update(json.dumps(stable, sort_keys=True).encode())
    for path in files:
        start, _, header = read_raw_header(path, MODEL_FILE)
        digest.update(json.dumps(header, sort_keys=True).encode())
        _digest_samples(digest, path, start, CHUNK_BYTES)


def _digest_samples(digest: hashlib._Hash, path: Path, start: int, head_bytes: int) -> None:
    """Add the file's size, the first bytes after `start`, and evenly spaced chunks to the digest."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        file.seek(start)
        digest.update(file.read(head_bytes))
        for index in range(SAMPLED_CHUNKS):
            offset = start + (size - start - CHUNK_BYTES) * (index + 1) // SAMPLED_CHUNKS
            if offset > start:
                file.seek(offset)
                digest.update(file.read(CHUNK_BYTES))


def check_gguf(source: ModelSource) -> None:
    """Check that the base is a GGUF file. Raises: ModelError."""
    assert source.gguf_file is not None
    path = source.folder / source.gguf_file
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"version "):
        raise ModelError(
            "the file is a Git LFS pointer, not the weights", "run `git lfs pull` in its folder", file=str(path)
        )
    if not start.startswith(b"GGUF") or os.path.getsize(path) < 64:
        raise ModelError("the file is not in the GGUF format", "fetch it again", file=str(path))
