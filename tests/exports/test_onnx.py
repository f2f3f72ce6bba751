"""`--to onnx`: optimum's conversion in its own environment, and ONNX Runtime's log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama
from tests.support.programs import needs
from tunekit.errors import InputError
from tunekit.export import CERTIFICATE, export_verb
from tunekit.exports import whole_model
from tunekit.targets.exportable import make_exportable
from tunekit.targets.target import find_target


def test_the_program_is_needed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "find_program", lambda name: None)
    with pytest.raises(InputError, match=r"is not installed; install it with: python -m .* onnx"):
        export_verb(str(tiny_llama), "onnx", str(tmp_path / "out"))


def test_the_template_of_the_base_stays_as_it_is(tmp_path: Path) -> None:
    """The temporary folder is made portable, and its files must not be links into the base then."""
    base = write_tiny_llama(tmp_path / "base")
    template = base / "chat_template.jinja"
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template.read_text()}))
    template.write_text("")
    target = make_exportable(find_target(str(base), None, []))
    with whole_model.whole_model(target, tmp_path / "out") as folder:
        assert (folder / template.name).read_text()
    assert not template.read_text()


class TestProgram:
    pytestmark = needs("onnx")

    @pytest.mark.parametrize("target", ["tiny_llama", "tuned_run"])
    def test_certificate(self, target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        path = tmp_path / "out"
        export_verb(str(request.getfixturevalue(target)), "onnx", str(path), certify=True)
        (part,) = json.loads((path / CERTIFICATE).read_text())["certificate"]["parts"].values()
        assert part["largest"] < 1e-3
        assert part["greedy_differences"] == 0
