"""`tunekit import` of whole configurations in the style of other tools' own examples: each becomes a recipe that runs
on local rows, every lost key is named once, and no other key is called lost."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.foreign_files import FILES, write_foreign_rows
from tunekit.cli import main
from tunekit.recipe.load import load_recipe
from tunekit.validate import validate


def run_import(folder: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `import` prints, after it wrote recipe.yaml."""
    (folder / name).write_text(FILES[name][0], encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tunekit", "import", str(folder / name), "--output", str(folder / "recipe.yaml")])
    with suppress(SystemExit):
        main()
    return capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    (tmp_path / "base").symlink_to(tiny_llama)
    write_foreign_rows(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_every_lost_key_is_named_once(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, lost = run_import(folder, name, capsys, monkeypatch), FILES[name][1]
    lines = [line.strip() for line in said.splitlines()]
    assert lines[-1] == (f"lost: {', '.join(lost)}" if lost else "nothing is lost")
    wrote = next((at for at, line in enumerate(lines) if line.startswith("wrote ")), len(lines) - 2)
    named = [re.sub(r"^[^ ]+: ", "", line).partition(":")[0] for line in lines[wrote + 1 : -1]]
    assert sorted(named) == sorted(lost)
    before = "\n".join(lines[: wrote + 1])
    assert not [key for key in lost if key != "dataset" and re.search(rf": {re.escape(key)} -> ", before)]
    changed, _, without = before.partition("\nwithout effect here:")
    keys = [set(re.findall(r"^(.*?:\d+: \S+) -> ", text, re.MULTILINE)) for text in (changed, without)]
    assert not keys[0] & keys[1], "a key is changed or without effect, not both"
    validate(str(folder / "recipe.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_recipe_trains(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_import(folder, name, capsys, monkeypatch)
    changes = ["training.max_steps=1", "model.dtype=float32", "output.report_to=[]"]
    changes += [f"output.dir={folder / 'run'}", "training.epochs=null"]
    monkeypatch.setattr(sys, "argv", ["tunekit", "train", str(folder / "recipe.yaml"), *changes])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert (folder / "run" / "report.json").exists()


def test_values_are_those_of_the_other_tools(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run_import(folder, "axolotl.yaml", capsys, monkeypatch)
    text, recipe = (folder / "recipe.yaml").read_text(encoding="utf-8"), load_recipe(folder / "recipe.yaml").recipe
    assert recipe.training.scheduler == "cosine_with_min_lr"
    assert recipe.training.scheduler_settings == {"min_lr_rate": 0.1}
    assert list(recipe.output.report_to) == ["wandb"]
    assert "set WANDB_PROJECT=my-project" in said
    assert "  alpha: 16\n" in text, "numbers come out as written"
    assert len(recipe.data.train) == 2, "a lost key costs that key only"


def test_the_launchers_file_is_not_passed_over(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "config_file -> nothing (num_processes: 2 is used" in run_import(folder, "trl.sh", capsys, monkeypatch)
    recipe = load_recipe(folder / "recipe.yaml").recipe
    assert recipe.training.gradient_accumulation_steps == 8, "each of two processes has its own micro-batches"
    assert recipe.training.scheduler_settings == {"min_lr_rate": 0.1}
    (folder / "recipe.yaml").unlink()
    said = run_import(folder, "trl_dpo.sh", capsys, monkeypatch)
    assert "config_file: the number of processes is not known, because deepspeed_zero2.yaml is not here" in said


def test_a_folder_is_not_named_twice(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "dataset_info.json").unlink()
    monkeypatch.chdir(folder)
    said = run_import(folder, "factory_dpo.yaml", capsys, monkeypatch)
    assert f"which is not in {folder} or {folder}/data; write" in said


def test_a_key_that_its_trainer_ignores_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run_import(folder, "factory_dpo.yaml", capsys, monkeypatch)
    lines = [line.partition(": ")[2] for line in said.splitlines() if "dropout" in line.rpartition("factory_dpo")[2]]
    assert lines == ["lora_dropout -> nothing (its trainer has no dropout)"]
