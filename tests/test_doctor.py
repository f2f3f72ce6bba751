"""`tunekit doctor`: what is there and what is missing, and the cache removed on demand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunekit import doctor


def test_missing_features_name_their_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "uvicorn" else object())
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    entry = tmp_path / "cache" / "tokens" / ("0" * 64)
    entry.mkdir(parents=True)
    (entry / "rows").write_bytes(b"x" * 50_000)
    doctor.doctor_verb(False, "-")
    told = capsys.readouterr()
    value = json.loads(told.out)
    assert value["missing"] == {"tunekit serve": "pip install 'tunekit[serve]'"}
    assert 50_000 <= value["cache_bytes"][str(tmp_path / "cache")] < 70_000
    assert value["versions"]["torch"]
    assert value["machine"]["free_disk_bytes"] > 0
    assert "pip install 'tunekit[serve]'" in told.err
    doctor.doctor_verb(True, "-")
    assert json.loads(capsys.readouterr().out)["cleared_bytes"] >= 50_000
    assert not (tmp_path / "cache").exists()


def test_clear_takes_nothing_that_was_not_kept_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TUNEKIT_CACHE may name a folder that holds other things, also under the names of the cache's own folders."""
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path))
    others = ["thesis.txt", "models/llama/config.json", "bases/mine.safetensors", "elsewhere/" + "1" * 64 + "/rows"]
    kept = ["models/tiny-llama-v1/config.json", "bases/" + "a" * 16 + "-" + "b" * 32 + ".safetensors"]
    for name in (*others, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 5000)
    (tmp_path / "tokens").symlink_to(tmp_path / "elsewhere")
    doctor.clear_cache()
    assert [(tmp_path / name).exists() for name in (*others, *kept)] == [True] * 4 + [False] * 2


def test_what_tunekit_keeps_is_known_as_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tunekit.files.durable import atomic_folder
    from tunekit.model.storage import builtin

    monkeypatch.setattr(builtin, "write_tiny_llama", lambda folder: (folder / "config.json").write_text("{}"))
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    folder = builtin.tiny_model_folder("builtin:tiny-llama")
    with atomic_folder(tmp_path / "cache" / "tokens" / ("0" * 64)) as work:
        assert doctor.cache_entries() == [work, folder]
    doctor.clear_cache()
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 1000)
    doctor.doctor_verb(False, None)
    assert "the checkpoints of a run may not fit" in capsys.readouterr().err
