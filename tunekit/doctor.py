"""`tunekit doctor`: shows versions, this machine, caches, and the packages that optional features need."""

import contextlib
import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunekit.console import Console
from tunekit.files.cache_folder import cache_entries, clear_cache, default_cache_folder
from tunekit.files.durable import free_bytes, json_result
from tunekit.machine.devices import make_devices
from tunekit.machine.environment import accelerator_names, library_versions, processor_name
from tunekit.machine.memory import available_bytes
from tunekit.model.compute import computes_bfloat16
from tunekit.records import bytes_text

FEATURES = {  # feature -> (modules that it needs, the command that installs them)
    "tunekit data check": (("rensa",), "pip install 'tunekit[data]'"),
    "tunekit serve": (("starlette", "uvicorn"), "pip install 'tunekit[serve]'"),
    "output.report_to: [tensorboard]": (("tensorboard",), "pip install 'tunekit[tensorboard]'"),
    "output.report_to: [wandb]": (("wandb",), "pip install wandb"),
    "output.report_to: [mlflow]": (("mlflow",), "pip install mlflow"),
    "output.report_to: [trackio]": (("trackio",), "pip install trackio"),
    "training.kernels: liger": (("liger_kernel",), "pip install liger-kernel"),
    "training.optimizer: adamw_8bit": (("bitsandbytes",), "pip install bitsandbytes"),
}


def doctor_verb(clear: bool, json_file: str | None) -> None:
    """Print the facts; with `clear`, empty the cache. Raises: RunFolderError if a cache entry cannot be removed."""
    console, write_result = Console(json_file=json_file), json_result(json_file)
    versions, (values, shown, findings) = library_versions(), machine_facts()
    caches = {str(path): size for path, size in cache_sizes().items()}
    missing = {name: how for name, (modules, how) in FEATURES.items() if not all(map(find_spec, modules))}
    console.panel("tunekit and its dependencies", versions | {"python": platform.python_version()})
    console.panel("this machine", shown)
    console.table(["cache", "size"], [[path, bytes_text(size)] for path, size in caches.items()])
    console.table(["feature", "installed"], [[name, missing.get(name) or "yes"] for name in FEATURES])
    console.warn(*findings)
    cleared = sum(map(_bytes, cache_entries())) if clear else 0
    if clear:
        clear_cache()
        console.info(f"{default_cache_folder()}: {bytes_text(cleared)} freed; a run recomputes the parts that it needs")
    result = {"versions": versions, "machine": values, "cache_bytes": caches, "missing": missing}
    write_result(result | {"findings": findings, "cleared_bytes": cleared})


def machine_facts() -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The facts of this machine as values, the same facts as texts, and problems that a run will have."""
    import torch

    devices = make_devices()
    device = devices.device
    devices.close()
    values: dict[str, Any] = {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "accelerators": accelerator_names(),
        "available_bytes": available_bytes(device),
        "free_disk_bytes": free_bytes(Path.cwd()),
        "computes_in": "bfloat16" if computes_bfloat16(device) else "float32",
    }
    findings = []
    if values["free_disk_bytes"] < 2**30:
        findings.append(
            f"{bytes_text(values['free_disk_bytes'])} free in this folder: the checkpoints of a run may not fit"
        )
    if device.type == "cpu" and find_spec("bitsandbytes") is None:
        findings.append("bitsandbytes is missing: model.quantization: int8 needs it; pip install bitsandbytes")
    if not accelerator_names() and shutil.which("nvidia-smi"):
        seen = f"an NVIDIA driver is installed, but torch {torch.__version__} finds no GPU"
        findings.append(f"{seen}: install a CUDA build of torch")
    shown = {
        "processor": f"{values['cpu']}, {values['cores']} cores",
        "accelerators": ", ".join(values["accelerators"]) or "none; runs use the CPU",
        "memory for a run": bytes_text(values["available_bytes"]),
        "model.dtype: auto": values["computes_in"],
        "free disk, this folder": bytes_text(values["free_disk_bytes"]),
    }
    return values, shown, findings


def cache_sizes() -> dict[Path, int]:
    """The sizes in bytes of tunekit's cache and of the Hugging Face cache, if they exist."""
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    places = [default_cache_folder(), Path(hub).expanduser()]
    return {path: _bytes(path) for path in places if path.is_dir()}


def _bytes(path: Path) -> int:
    """Bytes on the disk of a file, or of all files below a folder. Hard links count once; files that vanish count 0."""
    sizes: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(path):
        for name in (".", *names):
            with contextlib.suppress(OSError):
                info = os.lstat(os.path.join(place, name))
                sizes[info.st_dev, info.st_ino] = info.st_blocks * 512
    return sum(sizes.values()) or (path.lstat().st_blocks * 512 if path.is_file() else 0)
