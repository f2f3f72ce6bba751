"""`--to hub`: the folder and its card, what may not be in it, and the upload."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from tests.support.train_case import in_child, records, train_in_child, write_recipe
from tunekit.adapters.folder.read import read_adapter_config
from tunekit.artifacts.report.paired import difference_interval
from tunekit.artifacts.report.values import Values, read_run
from tunekit.errors import InputError, ResourceError
from tunekit.export import export_verb
from tunekit.exports import card
from tunekit.exports.card import evaluation_results
from tunekit.exports.format import Options
from tunekit.model.storage.upload import hub_name
from tunekit.records import bytes_text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    base = shutil.copytree(tiny_llama, folder / "small-base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    recipe = write_recipe(folder, base, data={"eval": 0.3}, training={"epochs": 1.0, "eval_steps": 1})
    ended = train_in_child(recipe, folder / "run")
    assert ended.code == 0, ended.output
    return folder / "run"


def test_the_interval_of_a_card_is_that_of_a_comparison() -> None:
    before, after, units = np.array([2.0, 3.0, 4.0]), np.array([1.0, 2.5, 3.9]), np.array([1.0, 1.0, 2.0])
    rows = Values(digests=["a", "b", "c"], before=before.tolist(), losses=after.tolist(), units=units.tolist())
    low, high = difference_interval(before, after, units)
    (_, text) = card._interval(rows)
    assert f"on 3 held-out rows, 95 % interval over rows: {low:+.4g} to {high:+.4g}." in text
    copies = {name: values * 9 for name, values in rows.items()}
    assert card._interval(Values(copies)) == ["", text]  # copies of a row are no further rows
    assert card._interval(Values(rows | {"digests": ["a", "a", "a"]})) == []


def test_an_adapter_folder_has_a_card_and_no_path_of_this_machine(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_verb(str(run), "hub", str(tmp_path / "orders"))
    folder = tmp_path / "orders"
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "tags": ["tunekit"],
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
    }
    report = json.loads((run / "report.json").read_text())
    assert f"| loss | {report['base_eval_loss']:.4g} | {report['eval_loss']:.4g} |" in card.text
    assert "95 % interval over rows" in card.text
    assert "| quantization of the base | none |" in card.text
    assert "The licence of the base model small-base: apache-2.0." in card.text
    for file in folder.iterdir():
        assert file.suffix == ".safetensors" or str(run.parent) not in file.read_text()
    assert read_adapter_config(folder).changed_files() == []  # tunekit.json has the hash of the new configuration
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        run / "adapter/adapter_model.safetensors"
    ).read_bytes()
    printed = capsys.readouterr().out
    assert "4 files are uploaded with --push, into the repository orders (private if it is new):" in printed
    assert "README.md (" in printed
    assert "write its hub name into README.md" in printed


def test_the_code_of_a_card_answers_and_the_numbers_are_those_of_the_log(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(run, tmp_path / "forged")
    report = json.loads((run / "report.json").read_text())
    report |= {"final_step": 9999, "rows_per_step": 9999, "measured_bytes": {"cpu": 9999 * 2**30}}
    report |= {"rows": {"trained": 9999}, "tokens_per_second": 9999.0}
    (copied / "report.json").write_text(json.dumps(report))
    export_verb(str(copied), "hub", str(tmp_path / "orders"))
    text = (tmp_path / "orders" / "README.md").read_text()
    assert "9,999" not in text
    assert "9999" not in text
    peak = max(record["peak_bytes"] for record in records(run) if "eval" not in record)
    assert f"| peak memory | {bytes_text(peak)} |" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert 'from_pretrained("NAMESPACE/small-base")' in code  # and not a path that others do not have
    assert "apply_chat_template" in code
    code = code.replace("NAMESPACE/small-base", str(run.parent / "small-base")).replace("NAMESPACE", str(tmp_path))
    capsys.readouterr()
    exec(code)
    assert "Hello" in capsys.readouterr().out
    assert "on small-base (llama, " in (run / "report.md").read_text()


def test_a_full_disk_is_named_by_the_output(run: Path, tmp_path: Path) -> None:
    output, size = tmp_path / "orders", (2000, 2000)
    ended = in_child(
        lambda: export_verb(str(run), "hub", str(output)),
        tmp_path / "log",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, size),
    )
    assert ended.code == 4, ended.output
    assert f"no room for {output}: " in ended.output
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_secret_or_a_private_path_ends_the_export(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    secret = "hf_" + "a" * 34
    home = "/ho" + "me/ada/notes"
    template = copied / "adapter" / "chat_template.jinja"
    template.write_text(f"{{# {secret} #}}\n{{# {home} #}}")
    with pytest.raises(InputError) as refused:
        export_verb(str(copied), "hub", str(tmp_path / "orders"))
    lines = [str(problem) for problem in refused.value.problems]
    assert lines[0].startswith(f"{template}:1: contains a secret, which is private")
    assert lines[1].startswith(f"{template}:2: contains {home}, which is private")
    assert not (tmp_path / "orders").exists()


def test_a_push_needs_a_base_that_others_have_and_can_be_repeated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"--push: the base .* is on this machine only"):
        export_verb(str(run), "hub", str(tmp_path / "orders"), None, Options(push=True))
    made: list[tuple[str, bool]] = []

    def refuse(self: HfApi, name: str, *, private: bool, exist_ok: bool) -> None:
        made.append((name, private))
        raise HfHubHTTPError.__mro__[1]("connection lost")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(
        ResourceError,
        match=r"the hub cannot be reached: connection lost; the folder is complete; .*hf upload --private merged",
    ):
        export_verb(str(run), "hub", str(tmp_path / "merged"), None, Options(push=True, merged=True))
    assert made == [("merged", True)]
    assert "files are to be uploaded, into the repository merged" in capsys.readouterr().out
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.to_dict()["library_name"] == "transformers"
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_results_on_a_data_set_of_the_hub_are_an_entry(run: Path, tmp_path: Path) -> None:
    assert evaluation_results(read_run(run)) is None
    copied = shutil.copytree(run, tmp_path / "run")
    plan = json.loads((copied / "plan.json").read_text())
    plan["recipe"]["data"]["eval"] = [{"path": "org/rows", "revision": "main", "split": "test"}]
    (copied / "plan.json").write_text(json.dumps(plan))
    entries = yaml.safe_load(evaluation_results(read_run(copied)) or "")
    assert [entry["notes"].partition(" ")[0] for entry in entries] == ["loss", "perplexity"]
    entry = entries[0]
    assert entry["dataset"] == {"id": "org/rows", "task_id": "default", "revision": "main"}
    assert entry["value"] == json.loads((copied / "report.json").read_text())["eval_loss"]


def test_a_model_folder_is_copied_without_what_is_private_or_of_a_training(run: Path, tmp_path: Path) -> None:
    base = shutil.copytree(run.parent / "small-base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": str(tmp_path / "elsewhere")}))
    (base / ".env").write_text("KEY=1")
    export_verb(str(base), "hub", str(tmp_path / "plain"))
    assert "_name_or_path" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not (tmp_path / "plain" / ".env").exists()
    assert (tmp_path / "plain" / "README.md").read_text() == (base / "README.md").read_text()
    (base / "run.log").write_text(f"saved in {base}")
    with pytest.raises(InputError, match=r"run\.log:1: contains .*base, which is private"):
        export_verb(str(base), "hub", str(tmp_path / "logged"))
    (base / "checkpoint-500").mkdir()
    (base / "checkpoint-500" / "training_args.bin").write_bytes(b"hub_token")
    with pytest.raises(
        InputError, match=r"contains checkpoint-500/training_args\.bin, which is the state of a training"
    ):
        export_verb(str(base), "hub", str(tmp_path / "nested"))
    shutil.rmtree(base / "checkpoint-500")
    (base / "optimizer.pt").write_bytes(b"state")
    with pytest.raises(InputError, match=r"contains optimizer\.pt, which is the state of a training"):
        export_verb(str(base), "hub", str(tmp_path / "trained"))


def test_a_folder_whose_name_begins_like_a_private_one_is_not_private(run: Path, tmp_path: Path) -> None:
    base = shutil.copytree(run.parent / "small-base", tmp_path / "base")
    (base / "notes.txt").write_text(f"{base}line and {base}.d")
    export_verb(str(base), "hub", str(tmp_path / "plain"))
    assert (tmp_path / "plain" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/base", "org/base"), ("./base", None), ("base.gguf", None), ("builtin:tiny-llama", None)],
)
def test_names_of_the_hub(name: str, expected: str | None) -> None:
    assert hub_name(name) == expected
