"""Where the tests find their real model: what scripts/fetch_model leaves, which the quickstart uses too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import yaml

from tests.conftest import REPOSITORY, SMOLLM2_FILE, find_smollm2


def test_the_places_in_their_order(tmp_path: Path) -> None:
    assert find_smollm2(tmp_path, None) is None
    file = tmp_path / ".cache" / "smollm2-gguf" / SMOLLM2_FILE
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_smollm2(tmp_path, None) == file
    folder = tmp_path / ".cache" / "smollm2"
    folder.mkdir()
    assert find_smollm2(tmp_path, None) == file  # a folder without a model is none
    (folder / "config.json").touch()
    assert find_smollm2(tmp_path, None) == folder
    assert find_smollm2(tmp_path, str(file)) == file
    assert find_smollm2(tmp_path, str(tmp_path / "nowhere")) is None  # what was named is not replaced by another


def test_quickstart_and_tests_use_the_file_that_is_fetched() -> None:
    recipe = yaml.safe_load((REPOSITORY / "recipes" / "quickstart.yaml").read_text("utf-8"))
    place = f".cache/smollm2-gguf/{SMOLLM2_FILE}"
    assert recipe["model"]["name_or_path"] == f"../{place}"
    assert f"\nmodel={place}\n" in (REPOSITORY / "scripts" / "fetch_model").read_text("utf-8")
    for script in ("quickstart", "test"):
        assert "scripts/fetch_model" in (REPOSITORY / "scripts" / script).read_text("utf-8")


def test_without_a_network_it_fails_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "fetch_model").write_bytes((REPOSITORY / "scripts" / "fetch_model").read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")  # pip as it ends where no index answers
    python.chmod(0o755)
    ended = subprocess.run(["bash", tmp_path / "scripts" / "fetch_model"], env=dict(os.environ), check=False)
    assert ended.returncode == 1
    assert [path.name for path in (tmp_path / ".cache").rglob("*")] == ["smollm2-gguf"]
