"""Reads and writes the LoRA of a diffusion pipeline in the formats of other programs: diffusers'
pytorch_lora_weights.safetensors, and kohya's files.

The keys of tensors are converted from PEFT's names to the other format's names, and back. diffusers reads alphas only
from the header (default: the rank); kohya's files store them as tensors.
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
from tunekit.files.untrusted import parse_json, printable
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import Target

PREFIX = AdapterPart.file_prefix
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # key of the header: JSON of {part.field: value}
FLAT = re.compile(r"(text_encoder(?:_2)?)\.(?=encoder\.)")  # CLIP's names in transformers 5
KOHYA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
KOHYA_ALONE = "lora_te"  # in a pipeline with one text encoder
MATRICES = {"lora_A": "lora_down", "lora_B": "lora_up"}
_SDXL_BLOCK = re.compile(
    r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_SDXL_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SDXL_OTHERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class ForeignLora:
    """A LoRA read from another program's file: tensors by PEFT's keys, and the alpha of each layer."""

    tensors: Tensors
    alphas: dict[str, float]


def diffusers_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under diffusers' keys, which are PEFT's keys without the prefix. Layers of CLIP text encoders get the
    names that all versions of diffusers know."""
    return {FLAT.sub(r"\1.text_model.", key.removeprefix(PREFIX)): value for key, value in tensors.items()}


def peft_keys(path: Path, header: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Returns the header of a diffusers LoRA file with PEFT's keys instead of diffusers' keys.

    Raises: AdapterError if the file's metadata (see diffusers_header) do not name the adapted layers.
    """
    text = (read_raw_header(path)[2].get("__metadata__") or {}).get(METADATA)
    if not isinstance(text, str):
        how = "convert it with: tunekit adapter adopt FILE --base PIPELINE"
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
    """The metadata for a diffusers LoRA file: for each part of the pipeline, the arguments of peft's LoraConfig.
    `claims`: fields of PEFT's configuration that distinguish the method."""
    fields: dict[str, Any] = {}
    for part in sorted({target.name.partition(".")[0] for target in targets}):
        part_targets = {
            target.name.partition(".")[2]: target for target in targets if target.name.startswith(f"{part}.")
        }
        ranks, alphas = zip(*map(_numbers, part_targets.values()), strict=True)
        rank, alpha = mode(ranks), mode(alphas)
        values = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: target.r for name, target in part_targets.items() if target.r != rank},
            "alpha_pattern": {name: value for name, value in zip(part_targets, alphas, strict=True) if value != alpha},
            "target_modules": list(part_targets),
            "use_rslora": bool(getattr(settings, "use_rslora", False)),
            "use_dora": False,
            **claims,
        }
        fields |= {f"{part}.{name}": value for name, value in values.items()}
    return {"format": "pt", METADATA: json.dumps(fields, indent=2, sort_keys=True)}


def _numbers(target: Target) -> tuple[int, float]:
    """The rank and alpha of a layer. An alpha without fraction is returned as an integer."""
    assert target.r is not None
    assert target.alpha is not None
    return target.r, int(target.alpha) if target.alpha == int(target.alpha) else target.alpha


def sdxl_name(layer: str, layers_per_block: int) -> str:
    """The name of a layer of SDXL's UNet in the original (SGM) code, from its name in diffusers.

    kohya's scripts, A1111 and Forge know only these names for SDXL. `layers_per_block`: the field of this name in the
    UNet's configuration. Source: kohya-ss/sd-scripts, sdxl_model_util.make_unet_conversion_map.
    """
    match = _SDXL_BLOCK.fullmatch(layer)
    if match is None:
        return _SDXL_OTHERS.get(layer, layer)
    side, block, kind, number, inner = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    inner = _SDXL_RESNET.get(inner, inner) if kind == "resnets" else inner
    # one more than layers_per_block: the last resnet, or the change of resolution
    first = block * (layers_per_block + 1)
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.2.{inner}"
    place = f"input_blocks.{first + number + 1}" if side == "down" else f"output_blocks.{first + number}"
    return f"{place}.{1 if kind == 'attentions' else 0}.{inner}"


def kohya_tensors(
    tensors: Mapping[str, Tensor],
    settings: AdapterSettings,
    targets: Sequence[Target],
    sdxl_layers: int | None = None,
) -> Tensors:
    """Tensors by kohya's keys. Each layer also gets an alpha, with which kohya's format scales the layer as the adapter
    does.

    diffusers reads only one alpha for each part of the pipeline. If ranks or alphas differ, all layers are therefore
    written with the largest rank R and with alpha R. B is multiplied by the layer's scale, and smaller ranks are padded
    with zeros.
    `sdxl_layers`: layers_per_block of the UNet of an SDXL pipeline, whose layers have other names in kohya's files.
    Raises: AdapterError for parts that kohya's format cannot name, and for tensors other than A and B.
    """
    numbers = {target.name: _numbers(target) for target in targets}
    root = bool(getattr(settings, "use_rslora", False))
    largest = max((rank for rank, _ in numbers.values()), default=0) if len(set(numbers.values())) > 1 else None
    single_encoder = sdxl_layers is None and not any(target.name.startswith("text_encoder_2.") for target in targets)
    converted: Tensors = {}
    for key, value in tensors.items():
        module, _, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if matrix not in MATRICES:
            what = f"kohya's format can only contain LoRA, but the adapter also has {printable(key, 200)}"
            raise AdapterError(what, "use the adapter folder itself, or merge the adapter")
        part, _, layer = FLAT.sub(r"\1.text_model.", module).partition(".")
        if part not in KOHYA_PARTS:
            raise AdapterError(f"kohya's format has no name for layers of '{part}'", "use diffusers' file")
        prefix = KOHYA_ALONE if single_encoder and part == "text_encoder" else KOHYA_PARTS[part]
        layer = layer if sdxl_layers is None or part != "unet" else sdxl_name(layer, sdxl_layers)
        name = f"{prefix}_{layer.replace('.', '_')}"
        rank, alpha = numbers[module]
        scale = alpha / rank**0.5 if root else alpha / rank
        if largest is not None:
            value = (
                _with_rank(value.float() * scale, 1, largest) if matrix == "lora_B" else _with_rank(value, 0, largest)
            )
        converted[f"{name}.{MATRICES[matrix]}.weight"] = value
        converted[f"{name}.alpha"] = torch.tensor(float(scale * rank if largest is None else largest))
    return dict(sorted(converted.items()))


def _with_rank(matrix: Tensor, axis: int, rank: int) -> Tensor:
    """A (R, I, ...) or B (O, R, ...), padded with zeros along `axis` to the size `rank`."""
    missing = [*matrix.shape[:axis], rank - matrix.shape[axis], *matrix.shape[axis + 1 :]]
    return torch.cat([matrix, matrix.new_zeros(missing)], axis)


def read_foreign(path: Path, modules: Sequence[str]) -> ForeignLora:
    """Reads a LoRA from a file of diffusers or kohya. `modules`: the names of the pipeline's modules.

    Raises: AdapterError.
    """
    header = read_tensor_header(path)
    tensors = {key: read_tensor(path, entry).float() for key, entry in header.items()}
    if any(key.startswith(("lora_unet", "lora_te")) for key in tensors):
        return _from_kohya(tensors, modules, str(path))
    try:
        return _from_diffusers(tensors, read_raw_header(path)[2].get("__metadata__") or {}, modules, str(path))
    except (ValueError, TypeError, AttributeError, re.error) as error:  # raised by values that diffusers does not write
        raise AdapterError(f"has a damaged {METADATA} ({error})", "fetch the file again", file=str(path)) from error


def _from_kohya(tensors: Mapping[str, Tensor], modules: Sequence[str], file: str) -> ForeignLora:
    """The LoRA of a kohya file. kohya replaces dots by underscores, so the pipeline's names must show where dots
    were."""
    names: dict[str, str] = {}
    blocks = [match for module in modules if (match := re.search(r"\bdown_blocks\.\d+\.\w+\.(\d+)\.", module))]
    layers_per_block = 1 + max((int(match[1]) for match in blocks), default=0)
    for module in modules:
        part, _, layer = FLAT.sub(r"\1.text_model.", module).partition(".")
        for prefix in {KOHYA_PARTS.get(part), KOHYA_ALONE if part == "text_encoder" else None} - {None}:
            for name in (layer, sdxl_name(layer, layers_per_block)):
                names[f"{prefix}_{name.replace('.', '_')}"] = module
    converted, alphas = dict[str, Tensor](), dict[str, float]()
    our_matrices = {theirs: ours for ours, theirs in MATRICES.items()}
    for key, value in tensors.items():
        name, _, suffix = key.partition(".")
        if name not in names:
            raise AdapterError(
                f"'{printable(key, 200)}' is not a linear layer of this pipeline",
                "choose a LoRA of this pipeline that does not adapt convolutions",
                file=file,
            )
        matrix = suffix.removesuffix(".weight")
        if matrix == "alpha":
            alphas[names[name]] = float(value)
        elif matrix in our_matrices:
            converted[f"{PREFIX}{names[name]}.{our_matrices[matrix]}.weight"] = value
        else:
            raise AdapterError(
                f"'{printable(key, 200)}' is not a tensor of a LoRA", "only LoRA is supported", file=file
            )
    ranks = {key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): len(v) for key, v in converted.items()}
    return ForeignLora(
        converted, {name: alphas.get(name, float(ranks[name])) for name in ranks if name in names.values()}
    )


def _from_diffusers(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], modules: Sequence[str], file: str
) -> ForeignLora:
    fields = json.loads(header.get(METADATA) or "{}")
    module_names, converted, alphas = set(modules), dict[str, Tensor](), dict[str, float]()
    for key, value in tensors.items():
        peft_key = key.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")
        peft_key = peft_key.replace(".lora_linear_layer.down.weight", ".lora_A.weight")
        peft_key = peft_key.replace(".lora_linear_layer.up.weight", ".lora_B.weight")
        module, _, matrix = peft_key.rpartition(".lora_")
        module = module if module in module_names else module.replace(".text_model.", ".", 1)
        if module not in module_names or matrix not in ("A.weight", "B.weight"):
            what = f"'{printable(key, 200)}' is not the LoRA of a linear layer of this pipeline"
            raise AdapterError(what, "choose a LoRA of this pipeline", file=file)
        converted[f"{PREFIX}{module}.lora_{matrix}"] = value
        if matrix == "A.weight":
            part = module.partition(".")[0]
            alpha = fields.get(f"{part}.lora_alpha", len(value))
            patterns = fields.get(f"{part}.alpha_pattern") or {}
            # with text_model; patterns without text_model match too
            layer = FLAT.sub(r"\1.text_model.", module).partition(".")[2]
            alpha = next((value for name, value in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", layer)), alpha)
            alphas[module] = float(alpha) * (len(value) ** 0.5 if fields.get(f"{part}.use_rslora") else 1.0)
    return ForeignLora(converted, alphas)
