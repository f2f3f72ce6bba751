"""A full-size model with random weights, made on the device from its configuration alone; the same for every tool.

Each matrix is drawn by a generator seeded with its name, normal x 0.02, rounded to bf16. A matrix is
packed before the next one is drawn, so that the device never holds more than the model and a few dense matrices.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
PACKERS = min(16, os.cpu_count() or 1)
NORMS = ("norm", "ln_", "layernorm", "layer_norm")


@contextmanager
def configuration_folder(model: str) -> Iterator[Path]:
    """A model folder that contains only config.json."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
        yield Path(scratch)


def model_section(folder: Path, quantization: str) -> ModelSection:
    """Computed in bf16."""
    return ModelSection(name_or_path=str(folder), dtype="bfloat16", quantization=quantization)  # type: ignore[arg-type]


def random_matrix(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight with this name: ones for a norm, zeros for a bias, otherwise normal x 0.02."""
    own, _, kind = name.lower().rpartition(".")
    if kind == "bias":
        return torch.zeros(shape, dtype=dtype, device=device)
    if len(shape) == 1 or any(mark in own.rpartition(".")[2] for mark in NORMS):
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed_for("bench", name))
    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return values.normal_(0.0, DEVIATION, generator=generator).to(dtype)


def begin_alike(adapter: Iterable[tuple[str, Tensor]]) -> None:
    """Fill every matrix A (R, I) of a LoRA with values that depend on its name, so that all tools start from the same
    adapter; B is zero already."""
    for name, values in adapter:
        own = name.removeprefix("base_model.model.").replace(".default", "")
        if own.endswith("lora_A.weight"):
            with torch.no_grad():
                values.copy_(random_matrix(own, tuple(values.shape), values.device, values.dtype))


def random_base(model: str, quantization: str, device: torch.device, home: torch.device | None = None) -> LoadedModel:
    """The base in bf16, or quantized. `home`: the device of the decoder layers; default: `device`."""
    with configuration_folder(model) as folder:
        base = make_meta_model(model_section(folder, quantization), device=device)
    net, layers = base.net, dict(base.family.layers(base.net))

    def home_of(name: str) -> torch.device:
        inside = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        return home if inside and home is not None else device

    modules = list(net.named_modules(remove_duplicate=True))
    _pack_all([(name, module) for name, module in modules if isinstance(module, PackedLinear)], device, home_of)
    for name, module in modules:
        _fill(name, module, net, device, home_of(name))
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        assert not tensor.is_meta, f"{name} was not made"
    net.requires_grad_(False)
    return replace(base, device=device)


def _pack_all(
    layers: list[tuple[str, PackedLinear]], device: torch.device, home_of: Callable[[str], torch.device]
) -> None:
    """Draw each matrix on the device, and quantize it on the CPU with one thread per core. One thread packs 1e8 numbers
    per second, which takes more than a minute for 8B. At most PACKERS dense matrices exist at a time."""

    def pack(named: tuple[str, PackedLinear]) -> None:
        name, layer = named
        dense = random_matrix(f"{name}.weight", (layer.out_features, layer.in_features), device, torch.bfloat16)
        for tensor_name, tensor in codec.pack(dense, layer.quantization, layer.double_quantization).items():
            setattr(layer, tensor_name, tensor.to(home_of(name)))

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(PACKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(pack, layers))
    torch.set_num_threads(threads)


def _fill(name: str, module: nn.Module, net: nn.Module, device: torch.device, home: torch.device) -> None:
    """Give the module's own parameters and buffers values, in place."""
    prefix = f"{name}." if name else ""
    if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
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
