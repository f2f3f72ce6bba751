"""`tunekit export` and `tunekit adapter adopt`: a pipeline's LoRA to the file of another program, and back to a folder.

Comes in: an adapter and a format, or a file of diffusers or kohya and its pipeline.  Goes out: a file, or a folder.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.config import adapter_header, tensors_path
from tunekit.adapters.folder.diffusers_file import ForeignLora, kohya_tensors, read_foreign
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.arithmetic.write import check_new_folder
from tunekit.console import Console
from tunekit.errors import InputError
from tunekit.files.tensors import read_tensor, write_tensors
from tunekit.model.load import base_fingerprint, make_meta_model
from tunekit.recipe.model import ModelSection, PipelineModel
from tunekit.recipe.recipe import make_adapter_settings
from tunekit.records import bytes_text
from tunekit.targets.target import as_trained, family_of, find_target, named_base, processor_of

FORMATS = ("kohya",)
FAMILY = "diffusion"
CPU = torch.device("cpu")


def export_verb(adapter: str, to: str, output: str, base: str | None) -> None:
    """Write the file. Raises: InputError for a format or an adapter that does not go with it."""
    if to not in FORMATS:
        raise InputError(f"--to {to} is unknown", f"choose {', '.join(FORMATS)}", key="--to")
    target, place = find_target(adapter, base, []), Path(os.path.abspath(Path(output).expanduser()))
    if target.adapter is None or family_of(target) != FAMILY:
        what = f"{adapter} is no adapter of a diffusion pipeline, and {to} is a format of those"
        raise InputError(what, "name a run or an adapter of objective: dreambooth")
    if place.suffix != ".safetensors" or place.exists():
        why = "exists" if place.exists() else "does not end in .safetensors"
        raise InputError(f"{output} {why}", "choose another --output", key="--output")
    section = as_trained(target, processor_of(target))[0].model
    net = make_meta_model(section, device=CPU).net
    attached = attach_adapter_folder(net, target.adapter, head_name=None, device=CPU)
    if not attached.method.in_diffusers_file:
        raise InputError(f"{to}'s format holds LoRA, and this is {attached.settings.method}", "use the folder itself")
    file = tensors_path(target.adapter)
    tensors = {key: read_tensor(file, entry) for key, entry in adapter_header(file).items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    size_bytes, _ = write_tensors(place, kohya_tensors(tensors, attached.settings, attached.targets), {"format": "pt"})
    Console().info(f"written to {place} ({bytes_text(size_bytes)})")


def adopt_verb(file: str, base: str | None, output: str) -> None:
    """Write the folder. Raises: InputError without such a file or pipeline, or where they do not go together."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {file}", "name a .safetensors file of diffusers or kohya")
    if base is None:
        raise InputError(
            "the file does not say of which pipeline it is", "name that with --base PIPELINE", key="--base"
        )
    place = check_new_folder(Path(output), [path])
    bare = ModelSection.model_validate({**named_base(base), "dtype": "float32"})
    every = ("unet", "transformer", "text_encoder", "text_encoder_2")
    whole: Any = make_meta_model(bare, device=CPU).net
    parts = tuple(name for name in every if whole.part(name) is not None)
    section = PipelineModel.of(bare, family=FAMILY, trained=parts)
    net = make_meta_model(section, device=CPU).net
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    found = read_foreign(path, linear)
    trained = tuple(name for name in parts if any(module.startswith(f"{name}.") for module in found.alphas))
    net = make_meta_model(PipelineModel.of(bare, family=FAMILY, trained=trained), device=CPU).net
    settings = _settings(found)
    attached = attach_adapter(net, settings, seed=0, head_name=None, device=CPU, filled=True)
    names = {part.file_key(name): name for part in attached.parts() for name in part.exported()}
    attached.load_state({names[key]: value for key, value in found.tensors.items()}, ("trained", "saved"))
    trains_text = any(name.startswith("text_encoder") for name in trained)
    size_bytes = save_adapter_folder(
        attached,
        place,
        base_name=bare.name_or_path,
        base_fingerprint=base_fingerprint(bare),
        revision=None,
        task_type=None,
        objective={"method": "dreambooth", "train_text_encoder": trains_text},
        of_pipeline=True,
    )
    Console().info(f"{len(found.alphas)} layers, written to {place} ({bytes_text(size_bytes)})")


def _settings(found: ForeignLora) -> Any:
    """The LoRA that the file holds, each layer by its name."""
    ranks = {name: len(found.tensors[f"base_model.model.{name}.lora_A.weight"]) for name in found.alphas}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, found.alphas))
    return make_adapter_settings(
        {
            "method": "lora",
            "r": rank,
            "alpha": alpha,
            "target_modules": list(found.alphas),
            "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
            "alpha_pattern": {name: each for name, each in found.alphas.items() if each != alpha},
        }
    )
