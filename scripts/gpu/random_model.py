"""A full-size model with random weights, made on the device from its configuration alone; the same for every tool.

Each matrix is drawn by a generator seeded with its name, normal x 0.02, rounded to bf16. A layer is made, packed and
put in place before the next, so that the device never holds more than the model and one matrix.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import MODELS
from torch import Tensor, nn

from tunekit.model.call import seed_for
from tunekit.model.load import LoadedModel, make_meta_model
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import PackedLinear
from tunekit.recipe.model import ModelSection

DEVIATION = 0.02
NORMS = ("norm", "ln_", "layernorm", "layer_norm")


@contextmanager
def configuration_folder(model: str) -> Iterator[Path]:
    """A model folder that holds nothing but config.json."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
        yield Path(scratch)


def model_section(folder: Path, quantization: str) -> ModelSection:
    """Computed in bf16."""
    return ModelSection(name_or_path=str(folder), dtype="bfloat16", quantization=quantization)  # type: ignore[arg-type]


def random_matrix(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight of this name: ones of a norm, zeros of a bias, else normal x 0.02."""
    own, _, kind = name.lower().rpartition(".")
    if kind == "bias":
        return torch.zeros(shape, dtype=dtype, device=device)
    if len(shape) == 1 or any(mark in own.rpartition(".")[2] for mark in NORMS):
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed_for("bench", name))
    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return values.normal_(0.0, DEVIATION, generator=generator).to(dtype)


def begin_alike(adapter: Iterable[tuple[str, Tensor]]) -> None:
    """Fill every A (R, I) of a LoRA by its name, so that all tools start from the same adapter; B is zero already."""
    for name, values in adapter:
        own = name.removeprefix("base_model.model.").replace(".default", "")
        if own.endswith("lora_A.weight"):
            with torch.no_grad():
                values.copy_(random_matrix(own, tuple(values.shape), values.device, values.dtype))


def random_base(model: str, quantization: str, device: torch.device, home: torch.device | None = None) -> LoadedModel:
    """The base in bf16, packed where asked. `home`: where the decoder layers lie; by default the device too."""
    with configuration_folder(model) as folder:
        base = make_meta_model(model_section(folder, quantization), device=device)
    net, layers = base.net, dict(base.family.layers(base.net))
    for name, module in list(net.named_modules(remove_duplicate=True)):
        inside = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        _fill(name, module, net, device, home if inside and home is not None else device)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        assert not tensor.is_meta, f"{name} was not made"
    net.requires_grad_(False)
    return replace(base, device=device)


def _fill(name: str, module: nn.Module, net: nn.Module, device: torch.device, home: torch.device) -> None:
    """Give the module's own parameters and buffers values, in place."""
    prefix = f"{name}." if name else ""
    if isinstance(module, PackedLinear):
        shape = (module.out_features, module.in_features)
        dense = random_matrix(f"{prefix}weight", shape, device, torch.bfloat16)
        for own, tensor in codec.pack(dense, module.quantization, module.double_quantization).items():
            setattr(module, own, tensor.to(home))
        del dense
    elif any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
        fresh: Any = type(module)(net.config)  # rotary tables: made from the configuration alone
        for own, buffer in fresh.named_buffers(recurse=False):
            module._buffers[own] = buffer.to(home)
    for own, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            values = random_matrix(f"{prefix}{own}", tuple(parameter.shape), device, parameter.dtype).to(home)
            made = nn.Parameter(values, requires_grad=False)
            replace_everywhere(net, parameter, made)


def replace_everywhere(net: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Also where it is tied."""
    for module in net.modules():
        for own, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[own] = new
