"""A LoRA of a diffusion pipeline as one file with the names of kohya's scripts, which ComfyUI and others read."""

import re
from pathlib import Path

import torch

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.config import adapter_header, tensors_path
from tunekit.adapters.folder.diffusers_file import kohya_tensors
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.errors import Problem
from tunekit.exports.format import Evidence, Exported, Options
from tunekit.files.tensors import read_tensor, write_tensors
from tunekit.model.load import make_meta_model
from tunekit.model.storage.source import read_json
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"pipeline adapter"})
OPTIONS: frozenset[str] = frozenset()
SUFFIX = ".safetensors"
SECOND_ENCODER = "text_encoder_2"  # with a UNet: an SDXL pipeline
LORA = re.compile(r"\.lora_[AB]\.weight$")  # keys of its tensors
PROGRAM = ""  # none reads the file back; tests load it with diffusers


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Refuse methods other than LoRA. Programs disagree about DoRA's magnitudes in a kohya file: LyCORIS divides the
    magnitudes by the norms of the tuned weights, ComfyUI by the norms of the base, and diffusers ignores them."""
    attached = _attached(exportable)
    extra = [key for key in adapter_header(tensors_path(exportable.adapter)) if not LORA.search(key)]
    if attached.method.in_diffusers_file and not extra:
        return []
    what = f"kohya's format can hold only LoRA, but this adapter is {attached.settings.method}"
    how = "use the adapter's folder itself, which diffusers reads, or merge it with: tunekit merge"
    return [Problem(f"{what}: programs do not agree how to compute its other tensors" if extra else what, how)]


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Write the file."""
    attached, file = _attached(exportable), tensors_path(exportable.adapter)
    tensors = {key: read_tensor(file, entry) for key, entry in adapter_header(file).items()}
    header, layers = {"format": "pt", "ss_network_module": "networks.lora"}, None
    if (exportable.folder / SECOND_ENCODER).exists() and (unet := exportable.folder / "unet" / "config.json").exists():
        header |= {"ss_base_model_version": "sdxl_base_v1-0"}
        layers = int(read_json(unet)["layers_per_block"])
    write_tensors(path, kohya_tensors(tensors, attached.settings, attached.targets, layers), header)
    return Exported(path, "adapter")


def _attached(exportable: Exportable) -> AttachedAdapter:
    cpu = torch.device("cpu")
    net = make_meta_model(exportable.target.model, device=cpu).net
    return attach_adapter_folder(net, exportable.adapter, head_name=None, device=cpu)
