"""`tunekit audit`: an honest run is proved; a forged one fails at the first forged step; other machines are refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.train_case import in_child, lose_the_end, records, train_in_child, write_recipe
from tunekit import audit
from tunekit.errors import InputError
from tunekit.recipe.load import load_recipe

FILES = ("tensors.safetensors", "state.json")
SECTIONS = {"training": {"save_steps": 2, "eval_steps": 3, "keep_checkpoints": 2, "max_grad_norm": 1.0}}


@pytest.fixture(scope="module")
def honest(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe, rows and a finished run: 6 steps, checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("audit")
    recipe = write_recipe(folder, tiny_llama, **SECTIONS)
    ended = train_in_child(recipe, folder / "run")
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture
def case(honest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in a copy of it, in a folder of the same depth: the recipe has relative paths."""
    return Path(shutil.copytree(honest, tmp_path_factory.mktemp("case"), dirs_exist_ok=True)) / "run"


def audited(
    run: Path, count: int | None = None, seed: int | None = None, before: Callable[[], None] = lambda: None
) -> Any:
    """How the audit ended, and what it wrote."""
    proof = run.parent / "proof.json"

    def work() -> None:
        audit.audit_verb(str(run), count, seed, str(proof))

    ended = in_child(work, run.parent / "audit.log", before)
    return ended, json.loads(proof.read_text("utf-8")) if proof.exists() else None


def files_of(run: Path) -> dict[Path, tuple[bytes, int]]:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file()}


def edit(file: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(file.read_text("utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def forge_manifests(run: Path) -> None:
    """The sha256 of each file, as one who changes a checkpoint would write them."""
    for folder in (run / "checkpoints").iterdir():
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
        sizes = {name: (folder / name).stat().st_size for name in FILES}

        def change(manifest: Any, hashes: Any = hashes, sizes: Any = sizes) -> None:
            manifest["files"] = {name: {"bytes": sizes[name], "sha256": hashes[name]} for name in FILES}

        edit(folder / "manifest.json", change)


def forge_fingerprint(run: Path, other: Path) -> None:
    """Put the fingerprint of another run wherever this run has its own."""
    other_fingerprint = json.loads((other / "environment.json").read_text("utf-8"))["fingerprint"]
    edit(run / "environment.json", lambda value: value.update(fingerprint=other_fingerprint))
    for folder in (run / "checkpoints").iterdir():
        edit(folder / "state.json", lambda value: value["facts"].update(fingerprint=other_fingerprint))
    forge_manifests(run)


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def first_different_step(run: Path, other: Path) -> int:
    """The first step whose loss is not the same in two runs."""
    pairs = zip(records(run), records(other), strict=True)
    return next(one["step"] for one, two in pairs if one.get("loss") != two.get("loss"))


def test_an_honest_run_is_proved_and_not_touched(case: Path) -> None:
    before = files_of(case)
    ended, proof = audited(case)
    assert ended.code == 0, ended.output
    assert files_of(case) == before
    assert [(part["start"], part["end"]) for part in proof["parts"]] == [(0, 4), (4, 6)]
    assert [part["records"] for part in proof["parts"]] == [6, 3]  # with the evaluations of steps 0, 3 and 6
    assert proof["equal"]
    assert proof["every_training_row_was_read"]
    assert "not computed again" not in ended.output
    assert proof["proved_steps"] == proof["steps"] == 6
    weights = hashlib.sha256((case / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert proof["parts"][1]["weights"] == {"adapter/adapter_model.safetensors": weights}
    rows = hashlib.sha256((case.parent / "train.jsonl").read_bytes()).hexdigest()
    assert proof["files"]["data.train.0.path"] == rows
    recorded = json.loads((case / "environment.json").read_text("utf-8"))["fingerprint"]
    assert (proof["data"], proof["base"]) == (recorded["data"], recorded["base"])


def test_the_files_of_a_pattern_are_hashed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    loaded = load_recipe(write_recipe(tmp_path, Path("base")), [f"data.train={tmp_path}/[ab].jsonl"])
    lines = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}.jsonl\n" for name in ("a", "b"))
    assert audit._file_hashes(loaded)["data.train.0.path"] == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.drawn
def test_a_stopped_run_is_audited_to_its_checkpoint(case: Path) -> None:
    lose_the_end(case)
    ended, proof = audited(case)
    assert ended.code == 0, ended.output
    assert [(part["end"], part["weights"]) for part in proof["parts"]] == [(4, {})]
    assert "proved: 1 of 1 parts, 4 of 6 steps" in ended.output
    assert "the steps after 4 have no checkpoint and are not proved" in ended.output


def test_a_seed_without_parts_is_refused() -> None:
    with pytest.raises(InputError, match="--seed decides which parts --parts draws, but --parts is missing"):
        audit.audit_verb("runs/none", None, 3, None)


def test_the_seed_draws_the_parts(case: Path) -> None:
    ended, proof = audited(case, 1, seed=1)
    assert ended.code == 0, ended.output
    assert f"{audit.ROWS_UNREAD}" in ended.output
    assert not proof["every_training_row_was_read"]
    drawn = random.Random(1).sample([4, 6], 1)
    assert [part["end"] for part in proof["parts"]] == drawn
    assert proof["proved_steps"] == {4: 4, 6: 2}[drawn[0]]


@pytest.mark.drawn
def test_a_flipped_byte_of_a_checkpoint_is_named(case: Path) -> None:
    tensors = case / "checkpoints" / "step-000004" / "tensors.safetensors"
    flip(tensors, -100)
    ended, _ = audited(case)
    assert ended.code == 2
    assert "step-000004 is damaged: tensors.safetensors differs from its sha256" in ended.output
    forge_manifests(case)
    ended, proof = audited(case)
    assert ended.code == 3
    assert "error: step 4: the checkpoint has different bytes in " in ended.output
    assert proof["parts"][0]["differences"][0]["step"] == 4


@pytest.mark.drawn
def test_a_flipped_byte_of_the_result_is_named(case: Path) -> None:
    flip(case / "adapter" / "adapter_model.safetensors", -2)
    ended, _ = audited(case)
    assert ended.code == 3
    assert "step 6: adapter/adapter_model.safetensors has different bytes" in ended.output


@pytest.mark.drawn
def test_a_changed_row_is_refused_and_with_forged_hashes_named(case: Path) -> None:
    rows = (case.parent / "train.jsonl").read_text("utf-8").splitlines()
    rows[6] = rows[6].replace("very", "most")
    (case.parent / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    ended, _ = audited(case)
    assert ended.code == 2
    assert "the training or evaluation rows differ" in ended.output
    other = case.parent / "other"
    assert train_in_child(case.parent / "recipe.yaml", other).code == 0
    forge_fingerprint(case, other)
    ended, proof = audited(case)
    assert ended.code == 3
    step = first_different_step(case, other)
    assert f"error: step {step}: " in ended.output
    assert proof["parts"][0]["differences"][0]["step"] == step
    assert not proof["equal"]


@pytest.mark.drawn
def test_another_seed_is_refused_and_with_a_forged_fingerprint_named(case: Path) -> None:
    recipe = case / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace("\n  seed: 0", "\n  seed: 1"), encoding="utf-8")
    ended, _ = audited(case)
    assert ended.code == 2
    assert "training.seed: changed since the run: was 0, is 1" in ended.output
    assert "computing again" not in ended.output  # it is refused before anything is computed
    other = case.parent / "other"
    assert train_in_child(case.parent / "recipe.yaml", other, "training.seed=1").code == 0
    forge_fingerprint(case, other)
    ended, proof = audited(case)
    assert ended.code == 3
    assert "error: step 0: eval.loss was " in ended.output  # the seed also draws the evaluation rows
    assert "\nstep 1: loss was " in ended.output
    assert proof["proved_steps"] == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda value: value.update(cpu="Another CPU"), "processor was Another CPU, is "),
        (lambda value: value["fingerprint"]["versions"].update(torch="1.0"), "torch was 1.0, is "),
        (lambda value: value["fingerprint"].update(threads=10**4), "computed with 10000 threads"),
        (lambda value: value.update(processes=2), "2 processes computed the run"),
        (lambda value: value["fingerprint"].update(device="cuda"), "device was cuda, is cpu"),
    ],
)
def test_a_run_without_equal_bits_is_refused(case: Path, change: Callable[[Any], None], text: str) -> None:
    edit(case / "environment.json", change)
    ended, proof = audited(case)
    assert ended.code == 2
    assert text in ended.output
    assert proof is None


@pytest.mark.parametrize(
    ("change", "place", "note"),
    [
        ({"processes": 2}, "processes: 2, processor: ", "number of processes: was 2, is 1; the last digits"),
        ({"cpu": "Another CPU"}, "processes: 1, processor: Another CPU", None),
    ],
)
def test_a_run_that_was_resumed_elsewhere_is_refused(
    change: dict[str, Any], place: str, note: str | None, case: Path
) -> None:
    """Its bits differ from those of one machine and one process, but nothing was forged."""
    lose_the_end(case)
    edit(case / "environment.json", lambda value: value.update(change))
    for _ in range(2):  # the second resume keeps the note of the first
        ended = train_in_child(case.parent / "recipe.yaml", case, resume=True)
        assert ended.code == 0, ended.output
        assert note is None or note in ended.output
        note = None
        refused, proof = audited(case)
        assert refused.code == 2
        assert f"a part of the run was computed elsewhere ({place}" in refused.output
        assert proof is None
        lose_the_end(case)


def test_adaptive_threads_and_missing_data_are_refused(case: Path) -> None:
    recipe = case / "recipe.yaml"
    text = recipe.read_text("utf-8")
    recipe.write_text(text.replace("\n  threads: null", "\n  threads: adaptive"), encoding="utf-8")
    ended, _ = audited(case)
    assert ended.code == 2
    assert "training.threads: adaptive" in ended.output
    recipe.write_text(text, encoding="utf-8")
    (case.parent / "train.jsonl").unlink()
    ended, _ = audited(case)
    assert ended.code == 2
    assert "train.jsonl" in ended.output


def change_records(run: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    lines = [json.dumps(record) for record in change(records(run))]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.mark.drawn
def test_forged_records_are_named(case: Path) -> None:
    """A second record of a step, and steps that are missing at the end."""
    change_records(case, lambda lines: [*lines[:1], {**lines[1], "loss": 0.001}, *lines[1:]])
    ended, _ = audited(case)
    assert ended.code == 3
    assert "step 1: loss was 0.001, is " in ended.output
    change_records(case, lambda lines: [line for line in [lines[0], *lines[2:]] if line["step"] < 6])
    shutil.rmtree(case / "checkpoints" / "step-000006")
    ended, _ = audited(case)
    assert ended.code == 3
    assert "error: step 6: " in ended.output
    assert "loss was (absent), is " in ended.output


@pytest.mark.drawn
def test_an_evaluation_that_is_not_computed_again_is_named(case: Path) -> None:
    """A resume may change eval_steps. Without the notice, an invented evaluation would seem to be proved."""
    invented = {"step": 2, "eval": {"loss": 0.1}}
    change_records(case, lambda lines: [*lines[:3], invented, *lines[3:]])
    edit(case / "report.json", lambda value: value["evaluations"].insert(1, invented))
    ended, proof = audited(case)
    assert ended.code == 0
    assert "steps 1 to 4: the evaluations after steps 2 were not computed again, so" in ended.output
    assert proof["parts"][0]["not_compared"] == [2]


def test_a_result_of_a_run_that_has_not_finished_is_refused(case: Path) -> None:
    """Without this, an exchanged adapter would not be compared."""
    flip(case / "adapter" / "adapter_model.safetensors", -2)
    edit(case / "status.json", lambda value: value.update(exit_code=130))
    ended, _ = audited(case)
    assert ended.code == 2
    assert "has a result, but its status.json does not state that it finished" in ended.output


@pytest.mark.drawn
def test_a_run_that_was_resumed_and_stopped_again_is_proved_up_to_its_last_checkpoint(case: Path) -> None:
    """Its result is that of the earlier end, by max_minutes, and is not compared."""
    flip(case / "adapter" / "adapter_model.safetensors", -2)
    edit(case / "status.json", lambda value: value.update(exit_code=143))
    edit(case / "report.json", lambda value: value.update(final_step=3))
    ended, proof = audited(case)
    assert ended.code == 0, ended.output
    assert proof["parts"][-1]["weights"] == {}
    assert "not compared: " in ended.output
    assert "adapter" in ended.output.partition("not compared: ")[2]


def test_a_finished_run_without_its_result_is_refused(case: Path) -> None:
    """Otherwise it would be computed again, and then reported as a run that does not follow from its recipe."""
    shutil.rmtree(case / "adapter")
    ended, _ = audited(case)
    assert ended.code == 2
    assert "has finished, but it has no folder adapter or model to compare with" in ended.output


@pytest.mark.drawn
def test_changed_files_next_to_the_weights_are_named(case: Path) -> None:
    """tunekit.json states the labels and settings with which an adapter computes."""
    (case / "adapter" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    edit(case / "adapter" / "tunekit.json", lambda value: value["settings"].update(alpha=64.0))
    ended, _ = audited(case)
    assert ended.code == 3
    assert "step 6: adapter/chat_template.jinja is not part of this result" in ended.output
    assert "step 6: adapter/tunekit.json has different values: settings.alpha was 64.0, is " in ended.output


@pytest.mark.drawn
def test_scores_of_tasks_and_removed_evaluations_are_named(case: Path) -> None:
    """Neither changes a step, so the audit passes. It must not seem to prove them."""
    change_records(case, lambda lines: [line for line in lines if "eval" not in line or line["step"] != 3])
    edit(case / "report.json", lambda value: value["evaluations"].pop(1))
    (case / "tasks.json").write_text(json.dumps({"scores": [{"task": "invented"}]}), encoding="utf-8")
    ended, proof = audited(case)
    assert ended.code == 0
    assert "steps 1 to 4: the run has no record of the evaluations after steps 3, " in ended.output
    assert audit.TASKS_UNPROVED in ended.output
    assert proof["parts"][0]["not_recorded"] == [3]


def test_records_before_the_first_step_are_named(case: Path) -> None:
    change_records(case, lambda lines: [{"step": -1, "eval": {"loss": 9.0}}, {"step": -1, "loss": 9.0}, *lines])
    ended, proof = audited(case, 1, seed=1)
    assert ended.code == 3
    assert "step -1: step was -1, is (absent); loss was 9.0, is (absent)" in ended.output
    assert proof["parts"][0]["not_compared"] == [-1]
