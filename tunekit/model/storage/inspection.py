"""What a base is, from its files alone: refusals by name before a weight is read, and the fingerprint.

Comes in: a ModelSource.  Goes out: ModelError, or facts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunekit.errors import ModelError
from tunekit.files.tensors import read_raw_header
from tunekit.files.untrusted import MODEL_FILE
from tunekit.model.storage.shards import shard_files
from tunekit.model.storage.source import PIPELINE_INDEX, ModelSource, find_source, read_json
from tunekit.recipe.model import HeadedModel, ModelSection

CHUNK_BYTES = 64 * 1024
SAMPLED_CHUNKS = 16
GGUF_HEAD_BYTES = 2**20
# What saving a model again changes, although the model stays the same.
VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "_attn_implementation",
    "_diffusers_version",
)
SPEECH = ("whisper", "moonshine")  # model types of speech models, whatever their architecture's ending
LABELLING = ("whisper",)  # those whose encoders can be trained to label recordings
HEADS = {  # ending of the architecture's name -> family
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForConditionalGeneration": "seq2seq",
    "MTModel": "seq2seq",  # MarianMTModel
    "ForSequenceClassification": "classifier",
    "ForTokenClassification": "token_classifier",
    "ForImageClassification": "image_classifier",
    "ForAudioClassification": "audio_classifier",
}
OTHER_HEADS = {
    "ForMaskedLM": "is a masked language model (it fills gaps and does not continue text)",
    "ForQuestionAnswering": "is a question-answering model",
    "ForSpeechSeq2Seq": "is a speech model",
    "ForCTC": "is a speech model",
    "ForPreTraining": "is a model with pre-training heads",
}
MEND = "choose a causal language model, an encoder-decoder such as T5, BART or Whisper, or a classifier"
HEARING = (
    "is no Whisper: audio_classify trains Whisper's encoder, which hears log-mel features, and none that reads raw "
    "waveforms (Wav2Vec2, HuBERT, WavLM) or spectrograms of another kind (AST)"
)
MIXED = "mixes its layers by trained weights (use_weighted_layer_sum), which audio_classify does not train"


def read_config(source: ModelSource) -> dict[str, Any]:
    """config.json of a folder, checked to be that of a model.

    Raises: ModelError where it is missing or damaged, or where the folder is an adapter or a run.
    """
    if (source.folder / "adapter_config.json").exists():
        raise ModelError(
            f"{source.name_or_path} holds an adapter, not a base model",
            "name the base here; an adapter is continued with adapter.init_from",
            key="model.name_or_path",
        )
    if (source.folder / "plan.json").exists() and (source.folder / "recipe.yaml").exists():
        how = f"merge its result first, and name that: tunekit merge {source.name_or_path} --output FOLDER"
        raise ModelError(f"{source.name_or_path} is a run, not a base model", how, key="model.name_or_path")
    if not (source.folder / "config.json").exists() and not any(source.folder.glob("*.safetensors")):
        ggufs = sorted(path.name for path in source.folder.glob("*.gguf"))
        if ggufs:
            how = f"name the file itself, for example {source.folder / ggufs[0]}"
            raise ModelError(f"{source.name_or_path} holds GGUF files", how, key="model.name_or_path")
        if is_pipeline(source):
            raise ModelError(
                f"{source.name_or_path} is a diffusion pipeline, and the objective trains another kind of model",
                "write objective: dreambooth, or choose another base",
                key="model.name_or_path",
            )
    return read_json(source.folder / "config.json")


def is_pipeline(source: ModelSource) -> bool:
    """Whether a base is a diffusion pipeline, as diffusers saves it."""
    return source.gguf_file is None and (source.folder / PIPELINE_INDEX).exists()


def pipeline_family(section: ModelSection) -> str:
    """The family of a pipeline. Raises: ModelError where the section asks for what it has not."""
    wrong = (
        ("family", section.family not in ("auto", "diffusion"), "diffusion or auto"),
        ("quantization", section.quantization != "none", "none"),
        ("attention", section.attention not in ("auto", "sdpa"), "auto"),
        ("trust_remote_code", section.trust_remote_code, "false"),
    )
    for key, is_wrong, instead in wrong:
        if is_wrong:
            what = f"{section.name_or_path} is a diffusion pipeline, which is not loaded so"
            raise ModelError(what, f"write {instead}", key=f"model.{key}")
    return "diffusion"


def head_labels(source: ModelSource, family: str) -> tuple[str, ...]:
    """Labels of the rows of the head of a classifier of this family, as the base's configuration names them; none of
    others."""
    raw = {} if source.gguf_file is not None else read_config(source)
    endings = tuple(ending for ending, kind in HEADS.items() if kind == family)
    if not any(str(name).endswith(endings) for name in raw.get("architectures") or ()):
        return ()
    names = raw.get("id2label")
    names = names if isinstance(names, dict) else {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names.get(str(number))) for number in range(len(names)))


def find_family(config: dict[str, Any], section: ModelSection) -> str:
    """The family of a base, by the architecture that its configuration names; `model.family` must say the same.

    Raises: ModelError with the reason for what is of none of the families.
    """
    if section.family == "diffusion":
        what = f"{section.name_or_path} is no diffusion pipeline: it holds no {PIPELINE_INDEX}"
        raise ModelError(what, "give a pipeline's folder, as diffusers saves it", key="model.name_or_path")
    kind = str(config.get("model_type", "unknown"))
    name = f"{section.name_or_path} ({kind})"
    headed = isinstance(section, HeadedModel)
    architectures = config.get("architectures") or []
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    family = next((family for ending, family in HEADS.items() if architecture.endswith(ending)), None)
    if kind in SPEECH and family == "seq2seq":
        family = "speech"
    reason = None
    if any(key in config for key in ("vision_config", "audio_config", "vq_config", "speech_config")):
        reason = "is a vision-language or audio-language model"
    elif architecture and family is None and not headed:
        known = (text for ending, text in OTHER_HEADS.items() if architecture.endswith(ending))
        reason = next(known, f"has the architecture {architecture}, which is none that tunekit knows")
    elif "audio_classifier" in (family, section.family):
        reason = audio_obstacle(config)
    if reason:
        raise ModelError(f"{name} {reason}", MEND, key="model.name_or_path")
    if headed:
        return section.family
    plain = "speech" if kind in SPEECH else "seq2seq" if config.get("is_encoder_decoder") else "causal"
    found = family or plain
    if section.family not in ("auto", found):
        raise ModelError(
            f"{name} is of the family {found}, by its architecture {architecture or '(none named)'}, and model.family "
            f"is {section.family}",
            "write family: auto, or choose another base",
            key="model.family",
        )
    return found


def audio_obstacle(config: dict[str, Any]) -> str | None:
    """Why a base cannot be trained to label recordings; None where it can."""
    if config.get("model_type") not in LABELLING:
        return HEARING
    return MIXED if config.get("use_weighted_layer_sum") else None


def family_of_base(section: ModelSection) -> str:
    """The family of a base by its own files; causal where they do not say, which is told where it is loaded."""
    source = find_source(section, weights=False)
    if is_pipeline(source):
        return "diffusion"
    if source.gguf_file is not None or not (source.folder / "config.json").exists():
        return "causal"
    try:
        return find_family(read_json(source.folder / "config.json"), section)
    except ModelError:
        return "causal"


def read_answer_start(source: ModelSource, section: ModelSection) -> int | None:
    """The token with which the decoder of an encoder-decoder begins; None of other bases, and where none is named."""
    path = source.folder / "config.json"
    if source.gguf_file is not None or not path.exists():
        return None
    config, newer = read_json(path), source.folder / "generation_config.json"
    try:
        family = find_family(config, section)
    except ModelError:  # said where the base is loaded
        return None
    if family not in ("seq2seq", "speech"):
        return None
    named = [read_json(newer)] if newer.exists() else []
    found = [values.get("decoder_start_token_id") for values in (*named, config)]
    return next((value for value in found if isinstance(value, int)), None)


def is_packed_by_bitsandbytes(config: dict[str, Any]) -> bool:
    """Whether the weights are stored in bitsandbytes' 4 bits, as merging onto a quantized base writes them."""
    stored = config.get("quantization_config")
    return isinstance(stored, dict) and bool(stored.get("load_in_4bit") or stored.get("_load_in_4bit"))


def check_quantized(config: dict[str, Any], section: ModelSection) -> None:
    """Refuse a base whose weights are stored quantized: alone by method, with a quantization of ours as a conflict.

    Raises: ModelError.
    """
    stored = config.get("quantization_config")
    if not stored:
        return
    method = str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else "unknown"
    if section.quantization != "none":
        raise ModelError(
            f"{section.name_or_path} is quantized already ({method}), and model.quantization asks for "
            f"{section.quantization} on top",
            "choose the unquantized base",
            key="model.quantization",
        )
    raise ModelError(
        f"{section.name_or_path} is stored quantized ({method}), which cannot be loaded",
        "choose the unquantized base; model.quantization quantizes it while loading",
        key="model.name_or_path",
    )


def fingerprint(source: ModelSource) -> str:
    """sha256 of the base: configuration, every file's header and size, and chunks sampled over its data.

    The same files give the same value wherever they lie; a changed number inside an unsampled chunk goes unseen.
    """
    digest = hashlib.sha256()
    if source.gguf_file is not None:
        _digest_samples(digest, source.folder / source.gguf_file, 0, GGUF_HEAD_BYTES)
        return digest.hexdigest()
    if is_pipeline(source):
        for path in sorted(source.folder.glob("*/config.json")):
            digest.update(path.parent.name.encode())
            _digest_folder(digest, read_json(path), sorted(path.parent.glob("*.safetensors")))
    else:
        _digest_folder(digest, read_config(source), [source.folder / name for name in shard_files(source.folder)])
    return digest.hexdigest()


def _digest_folder(digest: Any, config: dict[str, Any], files: Sequence[Path]) -> None:
    """Feed a configuration without what changes by itself, and the headers and samples of files."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in files:
        start, _, header = read_raw_header(path, MODEL_FILE)
        digest.update(json.dumps(header, sort_keys=True).encode())
        _digest_samples(digest, path, start, CHUNK_BYTES)


def _digest_samples(digest: Any, path: Path, start: int, head_bytes: int) -> None:
    """Feed size, the first bytes after `start`, and chunks at even distances to the end."""
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
    """Refuse what is no GGUF file.

    Raises: ModelError.
    """
    assert source.gguf_file is not None
    path = source.folder / source.gguf_file
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"version "):
        raise ModelError("is a Git LFS pointer, not the weights", "run `git lfs pull` there", file=str(path))
    if not start.startswith(b"GGUF") or os.path.getsize(path) < 64:
        raise ModelError("is not a GGUF file", "fetch it again", file=str(path))
