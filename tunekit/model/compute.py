"""Resolves `auto` to a compute dtype and an attention implementation that the device runs natively; and names the
packages that a model's code computes with."""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from tunekit.errors import ModelError
from tunekit.machine import devices
from tunekit.machine.environment import cpu_facts
from tunekit.model.pretrained import AutoClass
from tunekit.recipe.model import ModelSection

# If they are installed, transformers' code of recurrent layers computes with them on a GPU, and rounds differently.
RECURRENT_PACKAGES = ("mamba-ssm", "causal-conv1d", "flash-linear-attention")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(section: ModelSection, device: torch.device) -> torch.dtype:
    """The compute dtype. `auto` is bfloat16 if the device computes it natively. Otherwise it is float16 with a loss
    scale on a CUDA device (Turing and older), and float32 elsewhere.

    Raises: ModelError for float16 on a CPU, and for bfloat16 on a GPU that only emulates it.
    """
    if section.dtype == "auto":
        if computes_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = DTYPES[section.dtype]
    if dtype == torch.float16 and device.type == "cpu":
        what = "float16 is slow on a CPU, and it overflows there because loss scaling needs a GPU"
        raise ModelError(what, "write dtype: auto, bfloat16 or float32", key="model.dtype")
    if dtype == torch.bfloat16 and device.type != "cpu" and not computes_bfloat16(device):
        how = "write dtype: float16 or float32, or auto"
        raise ModelError("this device computes bfloat16 only by slow emulation", how, key="model.dtype")
    return dtype


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run natively on `device`."""
    return _cpu_has_bfloat16() if device.type == "cpu" else devices.computes_bfloat16(device)


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX-BF16 (x86) or the bf16 extension (ARM), as the Linux kernel reports it."""
    flags = cpu_facts().get("flags") or cpu_facts().get("features", "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def resolve_attention(
    section: ModelSection, config: PreTrainedConfig, device: torch.device, auto_class: AutoClass
) -> str:
    """The attention implementation; `auto` is torch's sdpa if the model supports it, otherwise eager.

    `auto_class`: transformers' class that loads models of this family.
    Raises: ModelError if the requested implementation is not available.
    """
    classes = auto_class._model_mapping
    known = type(config) in classes
    caps = getattr(config.get_text_config(), "attn_logit_softcapping", None)  # sdpa would ignore the caps
    has_sdpa = known and caps is None and bool(getattr(classes[type(config)], "_supports_sdpa", False))
    if section.attention == "auto":
        return "sdpa" if has_sdpa else "eager"
    if section.attention == "flash_attention_2" and device.type != "cuda":
        raise ModelError("flash_attention_2 needs a CUDA device", "write attention: auto", key="model.attention")
    if section.attention == "sdpa" and known and not has_sdpa:
        what = f"{config.model_type} cannot use sdpa, because sdpa would leave out a part of this model's attention"
        raise ModelError(what, "write attention: auto or eager", key="model.attention")
    return section.attention


def kernel_packages(net: nn.Module) -> tuple[str, ...]:
    """The packages, of those for recurrent layers, that the files of the net's classes name."""
    names = {type(module).__module__ for module in net.modules()}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in names if not name.startswith("torch.")]
    code = "".join(Path(file).read_text("utf-8", "ignore") for file in files if file).replace("-", "_")
    return tuple(package for package in RECURRENT_PACKAGES if package.replace("-", "_") in code)
