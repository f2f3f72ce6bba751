"""A base with recurrent layers whose packages are not installed: one note where a package would help, and no warning of
transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.composite_case import make_composite, write_composite
from tunekit.planning import kernels
from tunekit.planning.kernels import kernel_notes

MISSING = "causal-conv1d, flash-linear-attention"


def test_plan_names_the_packages_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_composite("qwen3_5")
    monkeypatch.setattr(kernels, "library_versions", dict)
    (note,) = kernel_notes("none", "", net, torch.device("cuda"))
    assert note.endswith(f"correct but slow; for faster kernels, install {MISSING}")
    assert not list(kernel_notes("none", "", net, torch.device("cpu")))  # they compute on GPUs only
    monkeypatch.setattr(kernels, "library_versions", lambda: dict.fromkeys(MISSING.split(", "), "1"))
    assert not list(kernel_notes("none", "", net, torch.device("cuda")))


@pytest.mark.drawn
def test_quiet_training_prints_no_warning_of_transformers(tmp_path: Path) -> None:
    write_composite("qwen3_5", tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        "model: {name_or_path: ./base, dtype: float32}\ndata: {train: [rows.jsonl], max_length: 64}\n"
        "adapter: {method: lora, r: 2}\noutput: {dir: run}\n"
        "training: {max_steps: 1, micro_batch_size: 1, gradient_accumulation_steps: 1}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "tunekit", "-q", "train", str(tmp_path / "recipe.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "transformers" not in done.stderr
