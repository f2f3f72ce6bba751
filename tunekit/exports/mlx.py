"""A folder for mlx-lm 0.32: an adapter in mlx-lm's layout, otherwise a merged model."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tunekit.arithmetic.normalise import PlainAdapter
from tunekit.contracts import Tensors
from tunekit.errors import Problem
from tunekit.exports.compare import compare_parts
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.plain_or_merged import (
    base_repository,
    limit_notes,
    merging_unties,
    plain_or_reason,
    quantization_note,
    unwritable,
    write_merged,
)
from tunekit.exports.programs.mlx import answers
from tunekit.exports.programs.program import Program
from tunekit.exports.settings import complete_gemma4
from tunekit.files.durable import write_json
from tunekit.files.tensors import write_tensors
from tunekit.model.families import make_family
from tunekit.model.storage.shards import read_headers
from tunekit.model.storage.source import read_json
from tunekit.records import JsonObject
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter"})
OPTIONS = frozenset({"merged"})
SUFFIX = ""
PROGRAM = "mlx"
READER = "mlx-lm"  # its name in model/storage/programs.py
# Models of mlx-lm 0.32 with the module names of transformers; those of gpt2 begin otherwise.
SAME_NAMES = (
    "gemma gemma2 gemma3_text gpt2 granite llama mistral mixtral olmo2 phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "smollm3 starcoder2"
)
# Those that have no head, whatever tie_word_embeddings says.
ALWAYS_TIED = "afm7 cohere cohere2 gemma gemma2 gemma3n gpt2 hunyuan internlm2 lfm2 lfm2_moe olmo phi3small"
OTHER_PROGRAM = "export it for another program, such as --to vllm"
LAYER = re.compile(r".*?\.(?:layers|h)\.\d+\.")  # the part of a module's name that mlx-lm's keys leave out


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to export: not a text model, an adapter that is a prompt, a model that mlx-lm computes wrongly,
    code that mlx-lm would run, or separate matrices for embedding and head where mlx-lm has only one."""
    if "model_file" in exportable.config and not exportable.target.model.trust_remote_code:
        what = "the base's config.json names a Python file (model_file), which mlx-lm before 0.32 runs"
        return [Problem(what, "if you trust this code, add model.trust_remote_code=true", key="--to")]
    if make_family(exportable.family).objectives != "causal":
        return [Problem(f"{exportable.family} models are not converted", "choose another --to", key="--to")]
    kind, wrong = exportable.config.get("model_type", ""), unwritable(exportable, READER)
    if not wrong and kind in ALWAYS_TIED.split() and merging_unties(exportable):
        what = f"mlx-lm's {kind} uses its embedding as head, but the adapter changes only one of the two"
        wrong.append(Problem(what, OTHER_PROGRAM))
    return wrong


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Write the low-rank pairs, padded to the same rank and with scale 1, or the merged model."""
    limits = limit_notes(exportable, READER)
    plain, reason = plain_or_reason(exportable, options, READER, partial(refusal, exportable.config))
    if plain is None:
        merged = write_merged(exportable, path, reason, "mlx_lm.generate --model PATH --prompt ...")
        _complete_config(path)
        return replace(merged, notes=(*merged.notes, *limits))
    plain, base = plain.padded(), exportable.target.model.name_or_path
    tensors: Tensors = {}
    names = {name: re.sub(r"^transformer\.", "model.", name) for name in plain.pairs}
    for name, pair in plain.pairs.items():
        tensors |= {f"{names[name]}.lora_a": pair.a.t().contiguous(), f"{names[name]}.lora_b": pair.b.t().contiguous()}
    keys = sorted({LAYER.sub("", name) for name in names.values()})
    config = exportable.config
    fields = {
        "model": base_repository(exportable),
        "fine_tune_type": "lora",
        "num_layers": config.get("num_hidden_layers", config.get("n_layer")),
        "lora_parameters": {"rank": plain.rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    path.mkdir(parents=True)
    write_tensors(path / "adapters.safetensors", tensors, {"format": "mlx"})
    write_json(path / "adapter_config.json", fields)
    command = f"run it with: mlx_lm.generate --model {base} --adapter-path {path} --prompt ..."
    return Exported(path, "adapter", (command, *limits, *quantization_note(exportable)))


def _complete_config(folder: Path) -> None:
    """Write the settings of a composite model that mlx-lm reads in the other place than transformers: in text_config
    or at the top."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    if isinstance(text, dict):
        tied = not any(name.endswith("lm_head.weight") for name in read_headers(folder))
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
        complete_gemma4(text)
        if "vocab_size" in text:
            config["vocab_size"] = text["vocab_size"]
        write_json(folder / "config.json", config)


def refusal(config: JsonObject, plain: PlainAdapter) -> str:
    """Why mlx-lm cannot hold these low-rank pairs; an empty text if it can."""
    kind = config.get("model_type")
    if kind not in SAME_NAMES.split():
        return f"mlx-lm may name the layers of {kind} differently from transformers"
    if plain.tied_pairs:
        return f"mlx-lm changes embedding and head together, but the adapter changes only {plain.tied_pairs[0]}"
    return "mlx-lm stores all experts in one module" if plain.experts else ""


def certify(
    written: Exported, exportable: Exportable, program: Program, questions: Callable[[], Questions], options: Options
) -> Certificate:
    """Compare all log-probabilities with torch's."""
    compared = questions()
    parts = compare_parts(written, exportable.folder, compared, partial(answers, program))
    return Certificate("MLX", program.version, compared.described, parts)
