"""The system message of the training rows is offered where a user talks to the result."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.data_case import write_lines
from tests.support.train_case import write_recipe
from tunekit import serve
from tunekit.chat import chat_verb
from tunekit.generate import generate_verb
from tunekit.serve import serve_verb
from tunekit.targets.system_message import trained_system
from tunekit.targets.target import find_target

SYSTEM = "You're brief."


def rows(*systems: str | None) -> list[dict[str, Any]]:
    starts = [[] if system is None else [{"role": "system", "content": system}] for system in systems]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    return [{"messages": [*start, *turns]} for start in starts]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    path = write_recipe(tmp_path, tiny_llama, evaluation={"max_new_tokens": 1})
    write_lines(tmp_path / "train.jsonl", rows(SYSTEM, SYSTEM, None))
    return path


@pytest.mark.parametrize(
    ("systems", "expected"),
    [((SYSTEM, SYSTEM, None), SYSTEM), ((SYSTEM, "Other.", None), None), ((None,), None)],
)
def test_the_message_of_most_rows_is_found(recipe: Path, systems: tuple[str | None, ...], expected: str | None) -> None:
    write_lines(recipe.with_name("train.jsonl"), rows(*systems))
    assert trained_system(find_target(str(recipe), None, [])) == expected


def test_pairs_have_it_too_and_missing_rows_are_no_error(recipe: Path, tiny_llama: Path) -> None:
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "q"}]
    write_lines(recipe.with_name("train.jsonl"), [{"prompt": prompt, "chosen": "a", "rejected": "b"}])
    written = json.loads(recipe.read_text()) | {"objective": "dpo"}
    recipe.write_text(json.dumps(written))
    target = find_target(str(recipe), None, [])
    assert trained_system(target) == SYSTEM
    recipe.with_name("train.jsonl").unlink()
    assert trained_system(target) is None
    assert trained_system(find_target(str(tiny_llama), None, [])) is None


def test_every_verb_offers_it(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_verb(str(recipe), None, ["q"], None, [])
    assert """to use it, add --system 'You'"'"'re brief.'""" in capsys.readouterr().err
    generate_verb(str(recipe), None, ["q"], None, [], system="Other.")
    assert "training rows" not in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda: (_ for _ in ()).throw(EOFError))
    chat_verb(str(recipe), None, [], [], None, None, (0.0, 1.0, 0, 0), 1)
    assert f"to use it, type: /system {SYSTEM}" in " ".join(capsys.readouterr().out.split())
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(serve, "make_server", lambda *values: SimpleNamespace(run=lambda sockets: None))
    monkeypatch.setattr(serve, "_announce", lambda *values: None)
    serve_verb(str(recipe), None, [], [], "127.0.0.1", 0, None, 1, 1)
    assert f"which clients must send: {json.dumps(SYSTEM)}" in " ".join(capsys.readouterr().out.split())
