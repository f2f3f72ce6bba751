"""`--to onnx`: optimum's conversion in its own environment, and ONNX Runtime's log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.programs import needs
from tunekit.errors import InputError
from tunekit.export import CERTIFICATE, export_verb
from tunekit.exports import whole_model


def test_the_program_is_needed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "find_program", lambda name: None)
    with pytest.raises(InputError, match=r"is not installed; install it with: python -m .* onnx"):
        export_verb(str(tiny_llama), "onnx", str(tmp_path / "out"))


class TestProgram:
    pytestmark = needs("onnx")

    @pytest.mark.parametrize("target", ["tiny_llama", "tuned_run"])
    def test_certificate(self, target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        path = tmp_path / "out"
        export_verb(str(request.getfixturevalue(target)), "onnx", str(path), certify=True)
        (part,) = json.loads((path / CERTIFICATE).read_text())["certificate"]["parts"].values()
        assert part["largest"] < 1e-3
        assert part["greedy_differences"] == 0
