"""LoRA of a diffusion pipeline in the files of others: diffusers' pytorch_lora_weights.safetensors, and kohya's.

Tensors by PEFT's keys and targets go in, tensors by the other tool's keys and what its header says come out; and back.
diffusers reads alphas from the header alone (without them alpha is the rank); kohya's files hold them as tensors.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.base import AdapterPart
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError
from tunekit.files.tensors import TensorEntry, read_raw_header, read_tensor, read_tensor_header
from tunekit.files.untrusted import parse_json, shown
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import Target

PREFIX = AdapterPart.file_prefix
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # of the header: JSON of {part.field: value}
FLAT = re.compile(r"(text_encoder(?:_2)?)\.(?=encoder\.)")  # CLIP, as transformers 5 names it
KOHYA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
KOHYA_ALONE = "lora_te"  # of a pipeline with one text encoder
MATRICES = {"lora_A": "lora_down", "lora_B": "lora_up"}
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class ForeignLora:
    """Tensors by PEFT's keys, and each layer's alpha."""

    tensors: Tensors
    alphas: dict[str, float]


def diffusers_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """By diffusers' keys: PEFT's without its prefix, CLIP's layers under the name that all versions know."""
    return {FLAT.sub(r"\1.text_model.", key.removeprefix(PREFIX)): value for key, value in tensors.items()}


def peft_keys(path: Path, header: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The header of a file that diffusers_tensors and diffusers_header made, by PEFT's keys again.

    Raises: AdapterError where the header says of no layer that it is adapted.
    """
    text = (read_raw_header(path)[2].get("__metadata__") or {}).get(METADATA)
    if not isinstance(text, str):
        how = "bring it in with: tunekit adapter adopt FILE --base PIPELINE"
        raise AdapterError(f"has no {METADATA}", how, file=str(path))
    fields = parse_json(text.encode(), str(path))
    named = {part: fields.get(f"{part}.target_modules") or [] for part in KOHYA_PARTS}
    flat = [part for part, names in named.items() if any(str(name).startswith("encoder.") for name in names)]
    begins = tuple(f"{part}.text_model." for part in flat)
    return {
        PREFIX + (key.replace(".text_model.", ".", 1) if key.startswith(begins) else key): entry
        for key, entry in header.items()
    }


def diffusers_header(claims: Mapping[str, Any], settings: AdapterSettings, targets: Sequence[Target]) -> dict[str, str]:
    """What the file's header says: for each part the arguments of peft's LoraConfig, the method's claims among them."""
    fields: dict[str, Any] = {}
    for part in sorted({target.name.partition(".")[0] for target in targets}):
        own = {target.name.partition(".")[2]: target for target in targets if target.name.startswith(f"{part}.")}
        ranks, alphas = zip(*map(_numbers, own.values()), strict=True)
        rank, alpha = mode(ranks), mode(alphas)
        values = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: target.r for name, target in own.items() if target.r != rank},
            "alpha_pattern": {name: value for name, value in zip(own, alphas, strict=True) if value != alpha},
            "target_modules": list(own),
            "use_rslora": bool(getattr(settings, "use_rslora", False)),
            "use_dora": False,
            **claims,
        }
        fields |= {f"{part}.{name}": value for name, value in values.items()}
    return {"format": "pt", METADATA: json.dumps(fields, indent=2, sort_keys=True)}


def _numbers(target: Target) -> tuple[int, float]:
    """Rank and alpha; a whole alpha as a whole number."""
    assert target.r is not None
    assert target.alpha is not None
    return target.r, int(target.alpha) if target.alpha == int(target.alpha) else target.alpha


def kohya_tensors(tensors: Mapping[str, Tensor], settings: AdapterSettings, targets: Sequence[Target]) -> Tensors:
    """By kohya's keys, with an alpha for each layer that gives the adapter's scale there.

    Raises: AdapterError for parts that kohya's format has no names for.
    """
    found, by_name = dict[str, Tensor](), {target.name: target for target in targets}
    alone = not any(target.name.startswith("text_encoder_2.") for target in targets)
    for key, value in tensors.items():
        own = key.removeprefix(PREFIX)
        module = re.split(rf"\.(?:lora_A|lora_B|{MAGNITUDE})\b", own)[0]
        part, _, layer = FLAT.sub(r"\1.text_model.", module).partition(".")
        if part not in KOHYA_PARTS:
            raise AdapterError(f"kohya's format has no name for layers of '{part}'", "use diffusers' file")
        prefix = KOHYA_ALONE if alone and part == "text_encoder" else KOHYA_PARTS[part]
        name = f"{prefix}_{layer.replace('.', '_')}"
        matrix = own[len(module) + 1 :].partition(".")[0]
        found[f"{name}.{MATRICES[matrix]}.weight" if matrix in MATRICES else f"{name}.dora_scale"] = value
        rank, alpha = _numbers(by_name[module])
        scale = alpha / rank**0.5 if getattr(settings, "use_rslora", False) else alpha / rank
        found[f"{name}.alpha"] = torch.tensor(float(scale * rank))
    return dict(sorted(found.items()))


def read_foreign(path: Path, modules: Sequence[str]) -> ForeignLora:
    """The LoRA of a file of diffusers or kohya for a pipeline with these modules. Raises: AdapterError."""
    header = read_tensor_header(path)
    tensors = {key: read_tensor(path, entry).float() for key, entry in header.items()}
    if any(key.startswith(("lora_unet", "lora_te")) for key in tensors):
        return _from_kohya(tensors, modules, str(path))
    try:
        return _from_diffusers(tensors, read_raw_header(path)[2].get("__metadata__") or {}, modules, str(path))
    except (ValueError, TypeError, AttributeError, re.error) as error:  # of values that are not what diffusers writes
        raise AdapterError(f"has a damaged {METADATA} ({error})", "fetch the file again", file=str(path)) from error


def _from_kohya(tensors: Mapping[str, Tensor], modules: Sequence[str], file: str) -> ForeignLora:
    """kohya writes an underscore for every dot, so that only the pipeline's own names tell where one was."""
    names: dict[str, str] = {}
    for module in modules:
        part, _, layer = FLAT.sub(r"\1.text_model.", module).partition(".")
        for prefix in {KOHYA_PARTS.get(part), KOHYA_ALONE if part == "text_encoder" else None} - {None}:
            names[f"{prefix}_{layer.replace('.', '_')}"] = module
    found, alphas = dict[str, Tensor](), dict[str, float]()
    turned = {theirs: ours for ours, theirs in MATRICES.items()}
    for key, value in tensors.items():
        name, _, rest = key.partition(".")
        if name not in names:
            raise AdapterError(f"'{shown(key, 200)}' names no layer of this pipeline", "choose its own", file=file)
        matrix = rest.removesuffix(".weight")
        if matrix == "alpha":
            alphas[names[name]] = float(value)
        elif matrix in turned:
            found[f"{PREFIX}{names[name]}.{turned[matrix]}.weight"] = value
        else:
            raise AdapterError(f"'{shown(key, 200)}' is no tensor of a LoRA", "only LoRA is read", file=file)
    ranks = {key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): len(v) for key, v in found.items()}
    return ForeignLora(found, {name: alphas.get(name, float(ranks[name])) for name in ranks if name in names.values()})


def _from_diffusers(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], modules: Sequence[str], file: str
) -> ForeignLora:
    fields = json.loads(header.get(METADATA) or "{}")
    known, found, alphas = set(modules), dict[str, Tensor](), dict[str, float]()
    for key, value in tensors.items():
        own = key.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")
        own = own.replace(".lora_linear_layer.down.weight", ".lora_A.weight")
        own = own.replace(".lora_linear_layer.up.weight", ".lora_B.weight")
        module, _, matrix = own.rpartition(".lora_")
        module = module if module in known else module.replace(".text_model.", ".", 1)
        if module not in known or matrix not in ("A.weight", "B.weight"):
            what = f"'{shown(key, 200)}' is no LoRA of a layer of this pipeline"
            raise AdapterError(what, "choose its own", file=file)
        found[f"{PREFIX}{module}.lora_{matrix}"] = value
        if matrix == "A.weight":
            part = module.partition(".")[0]
            alpha = fields.get(f"{part}.lora_alpha", len(value))
            patterns = fields.get(f"{part}.alpha_pattern") or {}
            layer = FLAT.sub(r"\1.text_model.", module).partition(".")[2]  # which patterns without it match too
            alpha = next((given for name, given in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", layer)), alpha)
            alphas[module] = float(alpha) * (len(value) ** 0.5 if fields.get(f"{part}.use_rslora") else 1.0)
    return ForeignLora(found, alphas)
