"""Finds a base: a local folder, a .gguf file, a built-in model, or a hub repository downloaded into the hub's cache."""

import glob
import json
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from tunekit.errors import ModelError
from tunekit.files.untrusted import MODEL_FILE, read_small
from tunekit.model.storage.builtin import tiny_model_folder
from tunekit.recipe.bases.paths import cannot_be_hub_name
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

KEY = "model.name_or_path"
PIPELINE_INDEX = "model_index.json"  # the index file of a diffusion pipeline
PIPELINE_WEIGHTS = [f"{part}/*.safetensors" for part in ("unet", "transformer", "vae", "text_encoder*")]
PIPELINE_VARIANTS = ["*.fp16.*", "*.non_ema.*"]  # the same weights in other variants, which are not downloaded
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DENSE = f"*_Dense/{WEIGHTS}"  # small layers of embedding models
CONFIG_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "USE_POLICY*", "NOTICE*")


@dataclass(frozen=True)
class ModelSource:
    """The files of a base on this machine. `gguf_file`: the name of a GGUF file in `folder`. `commit`: the commit, if
    the base comes from a hub repository."""

    name_or_path: str
    folder: Path
    gguf_file: str | None = None
    commit: str | None = None


def find_source(section: ModelSection, *, weights: bool) -> ModelSource:
    """Find the base that the section names. For a hub name, download missing files. `weights`: also download weights.

    Paths are absolute or begin with a dot. `org/name` always means the hub, even if a folder with this name exists.
    Raises: ModelError if there is no such folder, file, repository or revision.
    """
    name = section.name_or_path
    built_in = tiny_model_folder(name)
    if built_in is not None:
        return ModelSource(name, built_in)
    path = Path(name).expanduser()
    local = cannot_be_hub_name(name)
    try:
        mode = path.stat().st_mode if local else None
    except (OSError, ValueError):
        mode = None
    if mode is not None and stat.S_ISDIR(mode):
        return ModelSource(name, path)
    if mode is not None:
        if not stat.S_ISREG(mode):
            raise ModelError(f"{name} is neither a folder nor a regular file", "name the model's folder", key=KEY)
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is a file, but not a .gguf file", "name the model's folder", key=KEY)
        return ModelSource(name, path.parent, gguf_file=path.name)
    if local:
        raise ModelError(f"there is no folder or file {name}", "check the path", key=KEY)
    return _from_hub(section, weights)


def is_here(section: ModelSection) -> bool:
    """Whether the tokenizer and the configuration of a base can be read without a download."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = section.name_or_path
    if tiny_model_folder(name) is not None or Path(name).expanduser().exists():
        return True
    try:
        places = [
            try_to_load_from_cache(name, file, revision=section.revision) for file in ("config.json", PIPELINE_INDEX)
        ]
    except HFValidationError:
        return False
    return any(isinstance(place, str) for place in places)


def _from_hub(section: ModelSection, weights: bool) -> ModelSource:
    """Download a hub repository into the local cache of the hub. Returns the folder in the cache, and the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, XetDownloadError

    from tunekit.model.transformers_guard import quiet

    # also the base of the HTTP library's errors of connections
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        with quiet():
            fetch = partial(snapshot_download, section.name_or_path, revision=section.revision)
            folder = Path(fetch(allow_patterns=[*CONFIG_PATTERNS, DENSE]))
            if weights and (folder / PIPELINE_INDEX).exists():
                fetch(allow_patterns=PIPELINE_WEIGHTS, ignore_patterns=PIPELINE_VARIANTS)
            elif patterns := [*([WEIGHTS] * weights), *(["*.py"] * section.trust_remote_code)]:
                fetch(allow_patterns=patterns)
                if weights and not (folder / WEIGHTS).exists() and (files := _indexed_files(folder)):
                    fetch(allow_patterns=files)
    except HFValidationError as error:
        raise ModelError(f"{section.name_or_path!r} is neither a path nor a hub name", "correct it", key=KEY) from error
    except LocalEntryNotFoundError as error:
        here = Path(section.name_or_path)
        how = f"if you mean the folder {here.resolve()}, write this path" if here.exists() else "name a local folder"
        what = f"{section.name_or_path} is not on this machine and the hub cannot be reached"
        raise ModelError(what, how, key=KEY) from error
    except (http_error, XetDownloadError, OSError, ValueError) as error:
        how = "check the name and the revision; private and gated models need HF_TOKEN in the environment"
        if not isinstance(error, HfHubHTTPError | ValueError):
            how = "check the connection and the disk, and try again; finished files are kept"
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{section.name_or_path} ({section.revision}): {first_line}", how, key=KEY) from error
    return ModelSource(section.name_or_path, folder, commit=folder.name)


def _indexed_files(folder: Path) -> list[str]:
    """Patterns of the weights that are read if there is no single file: the files of the index. Many repositories
    contain the weights a second time, such as consolidated.safetensors or the folder `original`. A damaged index is
    refused later."""
    weight_map = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).exists() else None
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    return sorted(map(glob.escape, names))


def read_json(path: Path) -> JsonObject:
    """Read a JSON object from a regular file of valid size.

    Raises: ModelError for a file that is missing, not regular, too large, not JSON or not an object.
    """
    value = _parsed(path)
    if not isinstance(value, dict):
        raise ModelError("the file does not contain a JSON object", "fetch it again", file=str(path))
    return value


def read_json_list(path: Path) -> list[JsonObject]:
    """Read a JSON list of objects. Raises: ModelError, as `read_json`."""
    value = _parsed(path)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ModelError("the file does not contain a list of JSON objects", "fetch it again", file=str(path))
    return value


def _parsed(path: Path) -> object:
    data = read_small(path, MODEL_FILE)
    try:
        return json.loads(data.decode("utf-8-sig"))  # not parse_json: some models' configurations contain Infinity
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the file cannot be read as JSON ({error})", "fetch it again", file=str(path)) from error
