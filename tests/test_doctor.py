"""`tunekit doctor`: what is there and what is missing, the cache removed on demand, and model folders for other
programs."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama
from tunekit import doctor
from tunekit.errors import InputError, ModelError, ResourceError
from tunekit.files.durable import json_result
from tunekit.model.storage import model_folder

REPOSITORY = Path(__file__).resolve().parent.parent


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
    assert "cache" in told.err
    monkeypatch.setattr(doctor, "cache_sizes", dict)
    doctor.doctor_verb(False, "-")
    assert "cache" not in capsys.readouterr().err  # no empty table


def test_doctor_knows_the_packages_of_every_extra() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {module for modules, _ in doctor.FEATURES.values() for module in modules}
    commands = {command for _, command in doctor.FEATURES.values()}
    module_of = {"pillow": "PIL", "lm-eval": "lm_eval"}
    for extra in project["optional-dependencies"].keys() - {"dev", "docs", "trackers"}:  # trackers: one by one
        assert f"pip install 'tunekit[{extra}]'" in commands
        packages = {name.partition(">=")[0] for name in project["optional-dependencies"][extra]}
        assert {module_of.get(name, name) for name in packages} <= known, extra


def test_json_replaces_no_other_file(tmp_path: Path) -> None:
    model, result = tmp_path / "model.gguf", tmp_path / "result.json"
    model.write_bytes(b"GGUF weights")
    with pytest.raises(InputError, match=r"model\.gguf would replace a file that may be no result"):
        json_result(str(model))
    assert model.read_bytes() == b"GGUF weights"
    for value in ({}, [], {"a": 1}, [1]):
        json_result(str(result))(value)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl would replace"):
        json_result(str(tmp_path / "rows.jsonl"))
    (tmp_path / "config.json").write_text('{\n  "model_type": "llama"\n}\n')
    with pytest.raises(InputError, match=r"config\.json would replace"):
        json_result(str(tmp_path / "config.json"))


def test_clear_takes_nothing_that_was_not_kept_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TUNEKIT_CACHE may name a folder that holds other things, also under the names of the cache's own folders."""
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path))
    others = ["thesis.txt", "models/llama/config.json", "bases/mine.safetensors", "elsewhere/" + "1" * 64 + "/rows"]
    others += ["kernels/.git/config", "kernels/.env", "models/tiny-llama-v2/config.json"]
    kept = ["models/tiny-llama-v1/config.json", "bases/" + "a" * 16 + "-" + "b" * 32 + ".safetensors"]
    kept += ["kernels/.tunekit-kernels-abcdefg_/kernels.so"]
    for name in (*others, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 5000)
    (tmp_path / "tokens").symlink_to(tmp_path / "elsewhere")
    doctor.clear_cache()
    assert [(tmp_path / name).exists() for name in (*others, *kept)] == [True] * 7 + [False] * 3


def test_what_tunekit_keeps_is_known_as_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tunekit.files.durable import atomic_folder
    from tunekit.model.storage import builtin

    monkeypatch.setattr(builtin, "write_tiny_llama", lambda folder: (folder / "config.json").write_text("{}"))
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    folder = builtin.tiny_model_folder("builtin:tiny-llama")
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755  # other users of the cache read it
    with atomic_folder(tmp_path / "cache" / "tokens" / ("0" * 64)) as work:
        assert doctor.cache_entries() == [work, folder]
    doctor.clear_cache()
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 1000)
    doctor.doctor_verb(False, None)
    assert "perhaps too little for a run's checkpoints" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the time of the last change of each file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder as transformers 5 writes it, with code and files of its own."""
    folder = tmp_path / "base"
    write_tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e4}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    (folder / "parts").mkdir()
    (folder / "parts" / "more.bin").write_bytes(b"more")
    (folder / ".git").mkdir()
    (folder / "nowhere.bin").symlink_to(tmp_path / "nothing")
    return folder


def test_a_folder_is_checked_and_mended_in_a_copy(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, output = contents(base), tmp_path / "new" / "mended"
    assert doctor.model_verb(str(base), None, "-") == 2
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["model"], result["fixed"]) == (str(base), None)
    wrong = {each["program"] for each in result["programs"] for finding in each["findings"]}
    assert wrong == {"transformers 4", "ONNX (optimum)", "transformers 5", "mlx-lm", "Ollama"}
    assert "--fix OUT" in printed.err
    assert "transformers 4, mlx-lm, Ollama, ONNX (optimum): rope_parameters is not read" in printed.err

    assert doctor.model_verb(str(base), str(output), "-") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fixed"] == str(output)
    assert not any(each["findings"] for each in result["programs"])
    assert doctor.model_verb(str(output), None, None) == 0
    assert contents(base) == before
    assert {path.name for path in output.parent.iterdir()} == {"mended"}
    assert set(contents(output)) == set(before)
    for name, (data, _) in contents(output).items():
        linked = os.path.samefile(output / name, base / name)
        assert linked == name.endswith((".safetensors", ".bin"))
        assert (data == before[name][0]) == (
            name not in ("config.json", "tokenizer_config.json", "generation_config.json")
        )
    assert not (tmp_path / "was run").exists()


def test_weights_are_copied_where_links_are_impossible(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(model_folder.os, "link", refuse)
    assert doctor.model_verb(str(base), str(tmp_path / "mended"), None) == 0
    name = "model.safetensors"
    assert not os.path.samefile(tmp_path / "mended" / name, base / name)
    assert (tmp_path / "mended" / name).read_bytes() == (base / name).read_bytes()


def test_a_failed_copy_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "make_portable", fail)
    before = contents(base)
    with pytest.raises(ResourceError, match=rf"no room for {tmp_path}/out/mended"):
        doctor.model_verb(str(base), str(tmp_path / "out" / "mended"), None)
    assert list((tmp_path / "out").iterdir()) == []
    assert contents(base) == before


def test_only_a_new_folder_is_written(base: Path, tmp_path: Path) -> None:
    full, before = tmp_path / "full", contents(base)
    full.mkdir()
    (full / "mine").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(full)
    for output, reason in (
        (base, "overlaps"),
        (base / "inside", "overlaps"),
        (tmp_path, "overlaps"),
        (full, "not an empty folder"),
        (full / "mine", "not an empty folder"),
        (link, "not an empty folder"),
    ):
        with pytest.raises(InputError, match=reason):
            doctor.model_verb(str(base), str(output), None)
    assert contents(base) == before
    assert (full / "mine").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert doctor.model_verb(str(base), str(tmp_path / "empty"), None) == 0


def test_what_is_no_model_folder_is_refused(base: Path, tmp_path: Path) -> None:
    from tests.arithmetic.test_merge import CPU, train
    from tunekit.model.load import load_model
    from tunekit.recipe.model import ModelSection

    adapter = train(load_model(ModelSection(name_or_path=str(base)), device=CPU), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is an adapter.*merge it first"):
        doctor.model_verb(str(adapter), None, None)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no config\.json"):
        doctor.model_verb(str(tmp_path / "pipeline"), None, None)
    with pytest.raises(InputError, match="neither a folder"):
        doctor.model_verb(str(tmp_path / "missing"), None, None)
    deep = json.dumps({"model_type": "llama"})[:-1] + ', "a_config": {"rope_config": ' * 400 + "1" + "}" * 801
    (base / "config.json").write_text(deep)
    with pytest.raises(ModelError, match=r"nested too deeply|cannot be read as JSON"):
        doctor.model_verb(str(base), None, None)
