"""Lists the packages of tunekit that a machine lacks, and collects packages for a machine without a network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CARRIED_BYTES = 64 * 2**20  # limit of --pack
FOR_TESTS = ("pytest>=8.0", "hypothesis>=6.100", "peft>=0.21")
# Lower than tunekit's own limit, because images with a GPU have it. tests/gpu, tests/devices and tests/model pass with
# it, except packed rows of OPT, for which 5.17 always makes a dense mask; no row here is of OPT.
LOWEST_HERE = {"transformers": "5.17"}
# What happens without a package. Without any other one, nothing runs.
OPTIONAL = {
    "bitsandbytes": "4 bits are unpacked in plain torch, peft's NF4 rows and the tests of 4-bit peaks do not run",
    "datasets": "the tests of whole runs fail",
    "gguf": "nothing here reads GGUF files",
    "libgguf": "nothing here reads GGUF files",
    "typer": "the tests of whole runs fail",
    "rich": "the tests of whole runs fail",
    "jinja2": "the tests of whole runs fail",
    "pytest": "call 1 runs no test",
    "hypothesis": "call 1 runs no test",
    "peft": "call 1 runs no test, and the rows of peft do not run",
}
# What images with torch, transformers and peft lack, with the packages that these import.
PACKED = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "datasets", "dill", "multiprocess")
PACKED_ALONE = "bitsandbytes"  # pip would fetch torch to choose its release
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# bitsandbytes has a library for each release of CUDA, 20 MB each for the older ones; the others stay behind.
UNUSED = re.compile(r"libbitsandbytes_(?!cuda13\d\.so|cpu\.so)")


def requirements() -> list[tuple[str, str]]:
    """(name, lowest release) of each package that tunekit or its tests need."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pairs = (requirement.partition(">=") for requirement in [*project["dependencies"], *FOR_TESTS])
    return [(name, LOWEST_HERE.get(name, lowest)) for name, _, lowest in pairs]


def missing() -> tuple[list[str], list[str]]:
    """A line for each package that is absent or too old. Two lists: the packages without which nothing runs, and the
    others."""
    from packaging.version import Version

    needed, optional = [], []
    for name, lowest in requirements():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "absent"
        if installed == "absent" or Version(installed) < Version(lowest):
            line = f"{name} is {installed}; {lowest} or newer is needed"
            (optional if name in OPTIONAL else needed).append(
                line + (f": {OPTIONAL[name]}" if name in OPTIONAL else "")
            )
    return needed, optional


def pack(folder: Path, python: str) -> int:
    """Install these packages, for this release of Python on Linux, into the folder. Returns the folder's bytes.

    pip chooses releases that fit each other and their dependencies; the dependencies are not put into the folder.
    Raises: SystemExit if the folder is larger than CARRIED_BYTES.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore", "--target", str(folder)]
    command += ["--python-version", python, "--implementation", "cp", "--only-binary=:all:", "--no-compile"]
    command += [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    report = subprocess.run(
        [*command, "--dry-run", "--report=-", *PACKED], check=True, capture_output=True, text=True
    ).stdout
    releases = {each["metadata"]["name"]: each["metadata"]["version"] for each in json.loads(report)["install"]}
    chosen = [f"{name}=={number}" for name, number in releases.items() if name.replace("_", "-") in PACKED]
    subprocess.run([*command, "--no-deps", "--upgrade", *chosen, PACKED_ALONE], check=True)
    for file in folder.rglob("libbitsandbytes_*.so"):
        if UNUSED.match(file.name):
            file.unlink()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > CARRIED_BYTES:
        sys.exit(f"{folder} has {size / 2**20:.0f} MiB; the limit is {CARRIED_BYTES / 2**20:.0f} MiB")
    return size
