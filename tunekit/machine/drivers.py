"""Why torch finds no GPU on a machine that has one: the driver is older than the build of torch, or torch was built for
other devices."""

import ctypes
import os
import sys
from pathlib import Path

import torch

KFD, DRI = Path("/dev/kfd"), Path("/sys/class/drm")  # of AMD's driver for computing; of all GPUs
INTEL = "0x8086"


def gpu_problem(kfd: Path = KFD) -> str | None:
    """Why torch cannot use a GPU of NVIDIA or AMD that this machine has; None if it has none, if torch can use it, or
    if CUDA_VISIBLE_DEVICES hides it."""
    if torch.accelerator.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if (supported := driver_version()) is not None:
        return _of_nvidia(supported)
    if not kfd.exists():
        return None
    if torch.version.hip is None:
        return (
            f"an AMD GPU is installed ({kfd}), but torch {torch.__version__} was not built for ROCm: install that build"
        )
    if not os.access(kfd, os.R_OK | os.W_OK):
        return f"an AMD GPU is installed, but this user may not open {kfd}: join the groups render and video"
    return f"an AMD GPU is installed ({kfd}), but torch {torch.__version__} finds no GPU: update its driver"


def _of_nvidia(supported: tuple[int, int]) -> str:
    shown = ".".join(map(str, supported))
    wanted = torch.version.cuda
    if wanted is None:
        why = f"torch {torch.__version__} has no CUDA: install such a build"
        return f"an NVIDIA driver is installed (CUDA {shown}), but {why}"
    major, minor = map(int, wanted.split(".")[:2])
    if supported < (major, minor):
        how = f"update the driver, or install a build of torch for CUDA {shown}"
        return f"the driver supports CUDA {shown}, but torch {torch.__version__} was built for CUDA {wanted}: {how}"
    return f"an NVIDIA driver is installed (CUDA {shown}), but torch {torch.__version__} finds no GPU: run nvidia-smi"


def driver_version() -> tuple[int, int] | None:
    """The newest version of CUDA that NVIDIA's driver supports; None without this driver. Source: CUDA driver API,
    cuDriverGetVersion."""
    number = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None


def intel_problem(cards: Path = DRI) -> str | None:
    """A note on a GPU of Intel that torch does not use. Many processors contain one, so only doctor prints it."""
    vendors = [file.read_text(encoding="ascii").strip() for file in cards.glob("renderD*/device/vendor")]
    if torch.accelerator.is_available() or INTEL not in vendors:
        return None
    return f"a GPU of Intel is here, which torch {torch.__version__} does not use: a build for XPU uses Arc GPUs"
