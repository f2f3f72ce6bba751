"""Entries of a shared cache that another user wrote are not read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.data_case import write_lines
from tunekit.data.encoding import cache
from tunekit.files.cache_folder import is_own
from tunekit.model.storage.sidecar import open_sidecar, write_sidecar


def test_an_entry_of_another_user_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "entry"
    file.touch()
    assert is_own(file)
    owner = file.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert is_own(file) is (owner == 0), "the administrator's entries are read"


def test_packed_bases_and_encoded_rows_of_another_user_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "base.safetensors"
    write_sidecar(path, "key", [], iter(()))
    assert open_sidecar(path, "key", []) is not None
    monkeypatch.setattr("tunekit.model.storage.sidecar.is_own", lambda path: False)
    assert open_sidecar(path, "key", []) is None
    seen: list[Path] = []
    monkeypatch.setattr(cache, "is_own", lambda path: bool(seen.append(path)))
    (tmp_path / "entry").mkdir()
    write_lines(tmp_path / "entry" / "meta.json", [{}])
    assert cache._load_entry(tmp_path / "entry", None, ()) is None  # type: ignore[arg-type]
    assert seen == [tmp_path / "entry"]
