"""`tunekit export` writes an adapter as another program reads it."""

import os
from pathlib import Path

import torch

from tunekit.adapters.folder.config import adapter_header, tensors_path
from tunekit.adapters.folder.diffusers_file import kohya_tensors
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.console import Console
from tunekit.errors import InputError
from tunekit.files.tensors import read_tensor, write_tensors
from tunekit.model.families import make_family
from tunekit.model.load import make_meta_model
from tunekit.records import bytes_text
from tunekit.targets.target import family_of, find_target, processor_of, with_objective

CPU = torch.device("cpu")


def export_verb(adapter: str, to: str, output: str, base: str | None) -> None:
    """Write the file. Raises: InputError for a format or an adapter that does not go with it."""
    if to != "kohya":
        raise InputError(f"--to {to} is unknown", "choose kohya", key="--to")
    target, place = find_target(adapter, base, []), Path(os.path.abspath(Path(output).expanduser()))
    if target.adapter is None or not make_family(family_of(target)).is_pipeline:
        what = f"{adapter} is no adapter of a diffusion pipeline, and {to} is a format of those"
        raise InputError(what, "name a run or an adapter of objective: dreambooth")
    if place.suffix != ".safetensors" or place.exists():
        why = "exists" if place.exists() else "does not end in .safetensors"
        raise InputError(f"{output} {why}", "choose another --output", key="--output")
    section = with_objective(target, processor_of(target))[0].model
    net = make_meta_model(section, device=CPU).net
    attached = attach_adapter_folder(net, target.adapter, head_name=None, device=CPU)
    if not attached.method.in_diffusers_file:
        raise InputError(f"{to}'s format holds LoRA, and this is {attached.settings.method}", "use the folder itself")
    file = tensors_path(target.adapter)
    tensors = {key: read_tensor(file, entry) for key, entry in adapter_header(file).items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    size_bytes, _ = write_tensors(place, kohya_tensors(tensors, attached.settings, attached.targets), {"format": "pt"})
    Console().info(f"written to {place} ({bytes_text(size_bytes)})")
