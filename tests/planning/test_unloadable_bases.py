"""A base that train cannot load is refused by plan, in the same line, before any row is encoded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.composite_case import PROCESSOR_FILES, write_composite
from tests.support.plans import make_plan
from tests.support.train_case import train, write_recipe
from tunekit.errors import TunekitError
from tunekit.files.tensors import make_header, tensor_bytes
from tunekit.model.storage.reading import ALIGNMENT
from tunekit.recipe.load import load_recipe

NEWER = """
from transformers import modeling_utils
from tunekit.machine import versions
versions.tested_versions = lambda: {"transformers": "5.0"}
exec("def fail(*_, **__): raise AttributeError('rope')", vars(modeling_utils))
modeling_utils.PreTrainedModel._load_pretrained_model = modeling_utils.fail
from tunekit.cli import main
main()
"""
KERNELS = """
import socket
__version__ = "0.19.1"
socket.create_connection(("127.0.0.1", 1), timeout=1)
"""


@pytest.fixture
def aligned(tmp_path: Path, tiny_llama: Path) -> Path:
    """A recipe whose base transformers reads: its tensors are aligned, and in the compute dtype."""
    folder = tmp_path / "aligned"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_llama / "model.safetensors")
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
    header = make_header(entries, {"format": "pt"}, ALIGNMENT)
    (folder / "model.safetensors").write_bytes(header + b"".join(map(tensor_bytes, weights.values())))
    return write_recipe(tmp_path, folder, model={"dtype": "float32"})


def answers(code: str, recipe: Path, cache: Path, **environment: str) -> list[str]:
    """The one line with which each command ends."""
    lines = []
    for verb in (["plan"], ["train", "--dry-run"], ["train"]):
        command = [sys.executable, "-c", code, *verb, str(recipe)]
        variables = os.environ | {"TUNEKIT_CACHE": str(cache)} | environment
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
        assert done.returncode == 2, done.stderr
        lines += done.stderr.splitlines()
    assert not (cache / "tokens").exists()
    return lines


def test_a_newer_transformers_that_cannot_load(aligned: Path, tmp_path: Path) -> None:
    lines = answers(NEWER, aligned, tmp_path / "cache")
    assert len(lines) == 3
    [line] = set(lines)
    assert re.search(
        r"transformers [\d.]+ failed inside itself \(AttributeError: rope\) while it read .*aligned; ", line
    )
    assert "tested with 5.0: run pip install transformers==5.0" in line


def test_a_package_that_opens_a_socket_at_import(aligned: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "kernels-0.19.1.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.19.1\n"
    (site / "kernels-0.19.1.dist-info" / "METADATA").write_text(metadata, "utf-8")
    (site / "kernels.py").write_text(KERNELS, "utf-8")
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from tunekit.cli import main; main()"
    lines = answers(code, aligned, tmp_path / "cache")
    assert len(lines) == 3
    [line] = set(lines)
    assert re.search(
        r"aligned cannot be loaded: kernels 0\.19\.1 cannot be imported \(\w+: .*\); run: pip install", line
    )


def test_a_composite_base_without_processor_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_composite("gemma3", tmp_path / "base")
    for name in PROCESSOR_FILES:
        (tmp_path / "base" / name).unlink(missing_ok=True)
    recipe, told = write_recipe(tmp_path, tmp_path / "base"), set()
    monkeypatch.setattr("tunekit.planning.prepare.load_rows", lambda *_, **__: pytest.fail("rows are encoded"))
    for work in (lambda: make_plan(load_recipe(str(recipe))), lambda: train(recipe)):
        with pytest.raises(TunekitError, match=r"contains no processor files .*; copy them from the place") as caught:
            work()
        told.add(str(caught.value))
    assert len(told) == 1
    assert "\n" not in told.pop()
