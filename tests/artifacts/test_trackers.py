"""Experiment trackers: a run has its name and its recipe's hash, every number arrives with its step, and its end is
told as it was: failed, or finished after a resume. Each run in a process of its own, without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.train_case import in_child, kill_self, records, train_in_child, write_recipe
from tunekit.artifacts.run import RunFolder
from tunekit.artifacts.trackers import TrackedRun, Trackers
from tunekit.errors import InputError, RecipeError, TunekitError
from tunekit.records import StepRecord

CRASH_STEP, SAVED_STEP = 5, 4
Numbers = dict[tuple[int, str], float]  # (step, name) -> value


def read_tensorboard(run: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tracking" / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    numbers = {(event.step, tag): event.value for tag in tags["scalars"] for event in events.Scalars(tag)}
    assert all(len({e.step for e in events.Scalars(tag)}) == len(events.Scalars(tag)) for tag in tags["scalars"])
    (told,) = events.Tensors("recipe_hash/text_summary")[-1].tensor_proto.string_val
    return {"numbers": numbers, "hash": told.decode(), "name": None, "state": None, "runs": 1}


def read_mlflow(run: Path) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (experiment,) = client.search_experiments(filter_string="name = 'tunekit'")
    found = client.search_runs([experiment.experiment_id])
    numbers = {
        (point.step, name): point.value
        for name in found[0].data.metrics
        for point in client.get_metric_history(found[0].info.run_id, name)
    }
    told = found[0].data
    assert told.params["adapter.r"] == "4"
    state = {"FINISHED": "finished", "FAILED": "failed", "RUNNING": "running"}[found[0].info.status]
    name = found[0].info.run_name
    return {"numbers": numbers, "hash": told.tags["recipe_hash"], "name": name, "state": state, "runs": len(found)}


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is LevelDB's log after seven bytes: blocks of 32 KiB, records in parts."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_wandb(run: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    numbers: Numbers = {}
    ids, name, tags, exit_code = set(), None, [], None
    for file in sorted((run / "tracking" / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime):
        exit_code = None
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                name, tags = record.run.display_name, list(record.run.tags)
            if record.HasField("exit"):
                exit_code = record.exit.exit_code
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                step = items.get("_step", record.history.step.num)
                numbers |= {(step, key): value for key, value in items.items() if not key.startswith("_")}
    state = {None: "running", 0: "finished"}.get(exit_code, "failed")
    return {"numbers": numbers, "hash": tags[0].removeprefix("recipe-"), "name": name, "state": state, "runs": len(ids)}


def read_trackio(run: Path) -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    names = SQLiteStorage.get_runs("tunekit")
    rows = SQLiteStorage.get_logs("tunekit", names[0])
    numbers = {
        (row["step"], key): value for row in rows for key, value in row.items() if key not in ("step", "timestamp")
    }
    config = SQLiteStorage.get_run_config("tunekit", names[0])
    return {"numbers": numbers, "hash": config["recipe_hash"], "name": names[0], "state": None, "runs": len(names)}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
    "trackio": read_trackio,
}


@pytest.fixture(params=READERS)
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each that is installed, keeping what it is told below tmp_path."""
    name: str = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is absent: pip install 'tunekit[trackers]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return name


def read(tracker: str, run: Path) -> dict[str, Any]:
    """What it was told of a run; read in a child, so that no library of a tracker stays in this process."""
    found: dict[str, Any] = {}

    def work() -> None:
        values = READERS[tracker](run)
        values["numbers"] = [[step, name, value] for (step, name), value in values["numbers"].items()]
        (run.parent / "read.json").write_text(json.dumps(values))

    ended = in_child(work, run.parent / "read.log")
    assert ended.code == 0, ended.output
    found = json.loads((run.parent / "read.json").read_text())
    found["numbers"] = {(step, name): value for step, name, value in found["numbers"]}
    return found


def told(run: Path) -> Numbers:
    """What a tracker should have been told, after metrics.jsonl."""
    numbers: Numbers = {}
    for record in records(run):
        for name in ("loss", "learning_rate", "grad_norm"):
            numbers |= {(record["step"], name): record[name]} if name in record else {}
        numbers |= {(record["step"], f"eval/{name}"): value for name, value in record.get("eval", {}).items()}
    return numbers


def acts_after(step: int, action: Callable[[], None]) -> Callable[[], None]:
    """What a child does first: `action` follows this step's line in metrics.jsonl."""

    def install() -> None:
        original = RunFolder.append_metrics

        def append(self: RunFolder, record: Any) -> None:
            original(self, record)
            if isinstance(record, StepRecord) and record.step == step:
                action()

        RunFolder.append_metrics = append  # type: ignore[method-assign]

    return install


def fail() -> None:
    raise TunekitError("it broke")


@pytest.mark.parametrize("crash", [fail, pytest.param(kill_self, marks=pytest.mark.slow)])
def test_a_run_that_broke_and_went_on_is_one_run_with_every_number(
    tracker: str, crash: Callable[[], None], tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe", tiny_llama)
    run = tmp_path / "first"
    overrides = (f"output.report_to=[{tracker}]",)
    ended = train_in_child(recipe, run, *overrides, before=acts_after(CRASH_STEP, crash))
    assert ended.code == (1 if crash is fail else -9), ended.output
    buffers = tracker in ("wandb", "trackio")  # which a SIGKILL takes along
    lost = SAVED_STEP if buffers and crash is kill_self else -1
    if lost < 0:
        broken = read(tracker, run)
        assert broken["state"] in (None, "failed" if crash is fail else "running")
        assert {key for key in told(run) if key[0] <= SAVED_STEP} <= set(broken["numbers"])
    ended = train_in_child(recipe, run, *overrides, resume=True)
    assert ended.code == 0, ended.output
    assert "warning: output.report_to" not in ended.output
    found = read(tracker, run)
    assert found["runs"] == 1
    assert found["name"] in (None, "first")
    assert found["state"] in (None, "finished")
    assert len(found["hash"]) == 16
    expected = told(run)
    assert {step for step, _ in expected} == set(range(7)), "with the evaluation before step 1"
    expected = {key: value for key, value in expected.items() if key[0] > lost}
    assert {key: found["numbers"][key] for key in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aim", "comet_ml", "dvclive", "swanlab"])
def test_the_others_take_a_run_that_broke_and_went_on(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline; what they keep is theirs to read, so that only their not failing is seen."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is absent: pip install {name}")
    monkeypatch.chdir(tmp_path)
    offline = {"COMET_START_ONLINE": "0", "COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet"), "HOME": str(tmp_path)}
    offline |= {"SWANLAB_MODE": "offline"}
    for key, value in offline.items():
        monkeypatch.setenv(key, value)
    recipe, run = write_recipe(tmp_path / "recipe", tiny_llama), tmp_path / "first"
    ids = []
    for resume in (False, True):
        before = acts_after(CRASH_STEP, (lambda: None) if resume else fail)
        ended = train_in_child(recipe, run, f"output.report_to=[{name}]", resume=resume, before=before)
        assert ended.code == (0 if resume else 1), ended.output
        assert "warning: output.report_to" not in ended.output
        ids.append((run / "tracking" / "ids.json").read_text() if name != "dvclive" else "")
    assert ids[0] == ids[1]
    if name == "dvclive":
        lines = (run / "tracking" / "dvclive" / "plots" / "metrics" / "loss.tsv").read_text().splitlines()
        assert {line.split("\t")[0] for line in lines[1:]} == {str(step) for step in range(1, 7)}


def test_a_tracker_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names nothing_of_the_kind, which is not installed; run: pip install"):
        Trackers(("nothing_of_the_kind",), TrackedRun("first", tmp_path / "tracking", {}, 0), warn=print)


def test_equal_recipes_have_equal_hashes(tmp_path: Path) -> None:
    one = TrackedRun("one", tmp_path, {"a": 1, "b": [2]}, 0)
    assert one.recipe_hash == TrackedRun("two", tmp_path / "x", {"b": [2], "a": 1}, 7).recipe_hash
    assert one.recipe_hash != TrackedRun("one", tmp_path, {"a": 1, "b": [3]}, 0).recipe_hash


def test_a_tracker_that_fails_is_left_out_and_one_that_cannot_begin_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    warnings: list[str] = []
    run = TrackedRun("first", tmp_path / "tracking", {"a": 1}, 0)
    from accelerate.tracking import TensorBoardTracker

    logged: list[int] = []

    def log(self: Any, values: dict[str, float], step: int) -> None:
        logged.append(step)
        raise ConnectionError("the server\nis gone")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    with Trackers(("tensorboard",), run, warnings.append) as trackers:
        trackers.log({"loss": 1.0}, 1)
        trackers.log({"loss": 1.0}, 2)
    assert logged == [1]
    assert warnings == ["output.report_to: tensorboard failed and is not used any more: the server is gone"]
    monkeypatch.setattr(TensorBoardTracker, "start", lambda self: log(self, {}, 0))
    with pytest.raises(InputError, match=r"output\.report_to: tensorboard could not start: the server is gone"):
        Trackers(("tensorboard",), run, warnings.append)
