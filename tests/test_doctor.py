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
    (tmp_path / "cache" / "tokens").mkdir(parents=True)
    (tmp_path / "cache" / "tokens" / "rows").write_bytes(b"x" * 50_000)
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


def test_a_full_disk_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 1000)
    doctor.doctor_verb(False, None)
    assert "a run's checkpoints may not fit" in capsys.readouterr().err
