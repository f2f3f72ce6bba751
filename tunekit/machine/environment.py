"""The environment of a run for environment.json: versions, machine and threads. It contains nothing about the user."""

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tunekit
from tunekit.machine.versions import lowest_versions, normalised, tested_versions

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "datasets",
    "huggingface_hub",
    "numpy",
    "peft",
    "kernels",
    "liger-kernel",
    "flash-attn",
    "mamba-ssm",
    "causal-conv1d",
    "flash-linear-attention",
)


def library_versions() -> dict[str, str]:
    """Versions of tunekit and its dependencies, read without importing them; missing packages are left out."""
    versions, known = {"tunekit": tunekit.__version__}, {normalised(name) for name in LIBRARIES}
    for name in (*LIBRARIES, *(name for name in lowest_versions() if name not in known)):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@cache
def cpu_facts() -> dict[str, str]:
    """The kernel's facts about the first processor, such as `model name` and `flags`; empty on systems other than
    Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """The CPU's model name, or its architecture if the system does not report a name."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def accelerator_names() -> list[str]:
    """Names of the accelerators that this process can use. Apple's accelerator has no name; for it, the list contains
    the device type."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator)
    if not hasattr(module, "get_device_name"):
        return [accelerator.type]
    return [module.get_device_name(index) for index in range(module.device_count())]


def read_environment(*, device: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of environment.json: versions, platform, processors, threads, and settings that affect results."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": (versions := library_versions()),
        "tested_versions": {name: tested for name in versions if (tested := tested_versions().get(normalised(name)))},
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "device": device,
        "cpu": processor_name(),
        "accelerators": accelerator_names(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **(more or {}),
    }
