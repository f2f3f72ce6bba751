"""The environment variables that every command sets if the user has not. This module imports no torch, because they
must be set before."""

import os
import platform
from collections.abc import Mapping

from tunekit.machine.malloc import CACHED_KERNELS

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # the newest name first


def has_windows_driver(system: str = platform.system(), release: str = platform.release()) -> bool:
    """Whether the GPU's driver is that of Windows: on Windows, and on Linux inside it (WSL2)."""
    return system == "Windows" or "microsoft" in release.lower()


def torch_build() -> str:
    """The version of torch without importing it; the part after + names the build, such as 2.13.0+cpu."""
    from importlib.metadata import PackageNotFoundError, version  # a tenth of the time of --help, which needs it not

    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def allocator_settings(environment: Mapping[str, str], system: str, release: str, torch: str) -> dict[str, str]:
    """expandable_segments for torch's allocator, on Linux with a CUDA build and without a setting of the user.

    With the driver of Windows, the first allocation can fail (pytorch #192330); on ROCm, a copy to the GPU can hang
    (pytorch #192259).
    """
    of_cuda = torch.partition("+")[2][:2] in ("", "cu")  # the package index has the CUDA build without a suffix
    if system != "Linux" or has_windows_driver(system, release) or not torch or not of_cuda:
        return {}
    return {} if any(name in environment for name in ALLOCATOR) else {ALLOCATOR[0]: "expandable_segments:True"}


def variables() -> dict[str, str]:
    """Name to value, of each variable that this machine and this installation want."""
    return {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products; read when CUDA starts
        **allocator_settings(os.environ, platform.system(), platform.release(), torch_build()),
        **dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(CACHED_KERNELS)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "USE_HUB_KERNELS": "NO",  # transformers downloads no code for its layers
        "PYDANTIC_DISABLE_PLUGINS": "1",  # the search for plugins takes longer than reading a recipe
        "TRANSFORMERS_VERBOSITY": "error",  # its warnings name its own settings; plan's notes say what a user can do
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # its warnings about a lost rank have twenty lines of C++ frames each
    }
