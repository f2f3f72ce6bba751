"""LoRA files of other programs for a tiny diffusion pipeline, and what tunekit computes after adopting them.

LyCORIS ($TUNEKIT_PROGRAMS/lycoris) writes kohya's format; diffusers writes its own file and kohya's. Two forms of keys
that ComfyUI reads are written here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunekit.exports.programs.versions import programs_folder

ATTENTION, ALL = ["Attention"], ["Transformer2DModel", "ResnetBlock2D"]
LYCORIS: dict[str, dict[str, Any]] = {  # kind -> target modules, arguments of create_lycoris
    "LoRA of the attention": {"targets": ATTENTION, "algo": "lora"},
    "LoRA with convolutions": {"targets": ALL, "algo": "lora", "conv_dim": 2},
    "LoHa": {"targets": ATTENTION, "algo": "loha"},
    "LoKr": {"targets": ATTENTION, "algo": "lokr"},
    "DoRA": {"targets": ATTENTION, "algo": "lora", "dora_wd": True},
}
OTHERS = (
    "diffusers: its own file",
    "diffusers: kohya's format",
    "ComfyUI: diffusion_model keys",
    "ComfyUI: processor keys",
)
KINDS = (*(f"LyCORIS: {kind}" for kind in LYCORIS), *OTHERS)


def write_file(kind: str, pipeline: Any, file: Path) -> None:
    """Adapt the pipeline's UNet, and write the file. Raises: ModuleNotFoundError without LyCORIS."""
    maker, _, name = kind.partition(": ")
    (_with_lycoris if maker == "LyCORIS" else _with_diffusers)(name, pipeline, file)


def _move(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def _with_lycoris(name: str, pipeline: Any, file: Path) -> None:
    sys.path.append(str(programs_folder() / "lycoris"))
    from lycoris import LycorisNetwork, create_lycoris

    arguments = dict(LYCORIS[name])
    LycorisNetwork.apply_preset({"target_module": arguments.pop("targets"), "lora_prefix": "lora_unet"})
    network = create_lycoris(pipeline.unet, 1.0, linear_dim=4, linear_alpha=2, **arguments)
    network.apply_to()
    _move(network.parameters())
    network.save_weights(str(file), torch.float32, {})
    pipeline.lycoris = network


def _with_diffusers(name: str, pipeline: Any, file: Path) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    rank = 4  # diffusers and ComfyUI write no alpha here: it is the rank
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    _move(parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad)
    layers = get_peft_model_state_dict(pipeline.unet)
    if name == "its own file":
        metadata = {"lora_alpha": rank, "r": rank, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
        pipeline.save_lora_weights(
            str(file.parent), unet_lora_layers=layers, weight_name=file.name, unet_lora_adapter_metadata=metadata
        )
        return
    if name == "kohya's format":
        tensors = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in layers.items()})
    elif name == "diffusion_model keys":
        tensors = {f"diffusion_model.{key}": value for key, value in layers.items()}
    else:
        tensors = {_processor_key(key): value for key, value in layers.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)


def _processor_key(key: str) -> str:
    """unet....attn1.processor.to_q_lora.up.weight"""
    name, _, matrix = key.replace(".to_out.0.", ".to_out.").partition(".lora_")
    block, _, layer = name.rpartition(".")
    return f"unet.{block}.processor.{layer}_lora.{'down' if matrix.startswith('A') else 'up'}.weight"


def compare_file(kind: str, work: Path) -> dict[str, Any]:
    """One row of the table: the largest difference of the UNet's output, or the reason of a refusal."""
    from tests.adapters import test_diffusers_file as images
    from tunekit.adapters.folder.read import attach_adapter_folder
    from tunekit.arithmetic.adopt import adopt_lora
    from tunekit.errors import TunekitError

    unit: dict[str, Any] = {"maker": "files", "kind": kind, "largest": None, "refused": "", "failed": ""}
    base = images.saved_pipeline(work / "sd", "sd") if not (work / "sd").exists() else work / "sd"
    place = work / "".join(letter if letter.isalnum() else "_" for letter in kind)
    place.mkdir(parents=True, exist_ok=True)
    processor = images.load_processor(images.ModelSection(name_or_path=str(base)))
    plain, pipeline = images.theirs(processor, "sd", None), images.loaded_by_diffusers(base, "sd")
    file = place / "lora.safetensors"
    write_file(kind, pipeline, file)
    expected = unet_output(images, processor, pipeline)
    unit |= {"effect": float((expected - plain).abs().max()), "tensors": len(load_file(file))}
    try:
        adopt_lora(file, {"name_or_path": str(base)}, place / "adapter")
    except TunekitError as error:
        return {**unit, "refused": f"{error.problems[0].what}; {error.problems[0].how}"}
    net = images.load_net(processor.folder, [images.PIPELINES[processor.kind]], torch.float32)
    adapter = attach_adapter_folder(net, place / "adapter", head_name=None)
    whole = images.load_net(processor.folder, [images.PIPELINES[processor.kind], "text_encoder"], torch.float32)
    whole.set_submodule("unet", adapter.net.get_submodule("unet"))
    adapter.net = whole
    return {**unit, "largest": float((images.ours(adapter, processor) - expected).abs().max())}


@torch.no_grad()
def unet_output(images: Any, processor: Any, pipeline: Any) -> torch.Tensor:
    """The adapted UNet's output on the input of the tests."""
    inputs = images._inputs(processor)
    embeddings = pipeline.encode_prompt("a photo of sks dog", "cpu", 1, False)[0]
    return pipeline.unet(inputs["latents"], inputs["times"], embeddings).sample
