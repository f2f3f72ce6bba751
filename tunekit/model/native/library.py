"""Compiles kernels.c with this machine's C compiler and loads the library. The library is stored in the cache folder,
so only the first run compiles it."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from tunekit.files.cache_folder import default_cache_folder, hash_of, is_own

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
EXACT = "-ffp-contract=off"  # no fused multiplication and addition where torch's operations round in between
COMPILING_SECONDS = 120


class NoKernels(Exception):
    """Raised if the kernels cannot be used on this machine; the message states the reason."""


@cache
def load_kernels() -> ctypes.CDLL:
    """Load the compiled kernels from the cache folder. If that folder cannot be used, compile them for this process.

    Raises: NoKernels.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NoKernels("the kernels need Linux on x86-64")
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoKernels("there is no C compiler")
    version = _output_of([compiler, "--version"])
    processor = [line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("flags")][:1]
    name = f"{hash_of([SOURCE.read_text('utf-8'), FLAGS, EXACT, version, processor])}.so"
    with suppress(OSError):  # the folder cannot be written, or the file is damaged or another user's
        return _library(compiler, default_cache_folder() / "kernels" / name)
    try:
        with tempfile.TemporaryDirectory(prefix="tunekit-") as folder:
            return _library(compiler, Path(folder) / name)
    except OSError as error:
        raise NoKernels(str(error)) from error


def _library(compiler: str, path: Path) -> ctypes.CDLL:
    """Load the library at `path`, and compile it first if the file does not exist. Raises: NoKernels, OSError."""
    if not path.exists():
        _compile(compiler, path)
    if not is_own(path):
        raise PermissionError(f"{path} is another user's")
    return ctypes.CDLL(str(path))


def _compile(compiler: str, path: Path) -> None:
    """Compile the library under a temporary name, then rename it, because another process may load it now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tunekit-kernels-", dir=path.parent) as folder:
        result = Path(folder) / "kernels.so"
        _output_of([compiler, *FLAGS, EXACT, "-shared", "-fPIC", str(SOURCE), "-o", str(result), "-lm"])
        os.replace(result, path)


def _output_of(command: list[str]) -> str:
    """Run the command and return its output.

    Raises: NoKernels with the first error line.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILING_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(str(error)) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise NoKernels(f"{Path(command[0]).name}: {lines[0] if lines else done.returncode}")
    return done.stdout
