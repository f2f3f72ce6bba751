"""device.cpp goes in, the simulated device as a library in .cache comes out, made once for each build of torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
KIND = os.environ.get("TUNEKIT_SIMULATED_KIND", "cuda")  # or xpu, mps
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "devices"


def torch_folder() -> Path:
    """Where torch is installed; torch is not imported."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def missing() -> str | None:
    """Why there can be no simulated device here, or None."""
    if shutil.which("g++") is None:
        return "there is no g++ that could build the simulated device"
    if "+cpu" not in version("torch") and next(torch_folder().glob("lib/libtorch_cuda*"), None):
        return "this torch has CUDA of its own"
    return None


def library() -> Path:
    """The compiled device, built where it is not there yet."""
    key = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    built, torch = CACHE / f"{KIND}-{key}.so", torch_folder()
    if not built.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        folders = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", f"-L{torch / 'lib'}"]
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-DKIND={KIND.upper()}", "-o"]
        subprocess.run(
            [*command, str(unfinished), str(SOURCE), *folders, "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"],
            check=True,
        )
        unfinished.rename(built)
    return built
