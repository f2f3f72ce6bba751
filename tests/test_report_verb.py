"""`tunekit report` and `tunekit runs`, through their verbs."""

from __future__ import annotations

import csv
import json
import socket
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.support.run_case import write_run
from tunekit import watch
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.values import run_values
from tunekit.errors import InputError
from tunekit.files.lock import FolderLock, is_held
from tunekit.report import report_verb
from tunekit.runs import clean_verb, runs_verb
from tunekit.watch import watch_verb


def test_one_run_gets_its_page_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "first")
    report_verb([str(folder)], None, None, None)
    assert "<title>first</title>" in (folder / "report.html").read_text("utf-8")
    shown = capsys.readouterr().out
    assert "401.5" in shown
    assert f"page: {folder / 'report.html'}" in shown


def test_runs_are_written_as_json_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write_run(tmp_path / f"r{seed}", seed=seed)) for seed in (1, 2)]
    files = {name: tmp_path / f"out.{name}" for name in ("html", "json", "csv")}
    report_verb(folders, *map(str, files.values()))
    value = json.loads(files["json"].read_text("utf-8"))
    assert value["differing"] == {"training.seed": ["1", "2"]}
    loss = json.loads((tmp_path / "r1" / "report.json").read_text("utf-8"))["eval_loss"]
    assert value["runs"][0]["outcome"]["eval loss"] == loss
    with files["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["r1", "r2"]
    assert float(rows[0]["eval loss"]) == loss
    assert "2 runs compared" in files["html"].read_text("utf-8")
    assert "mean and standard deviation over the seeds of r1, r2" in capsys.readouterr().out
    with pytest.raises(InputError, match="named twice"):
        report_verb([folders[0], folders[0]], None, None, None)


def test_a_damaged_run_keeps_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page of the only readable run does not replace it."""
    torn, good = (write_run(tmp_path / name) for name in ("torn", "good"))
    rows = json.loads((torn / "evaluation_rows.json").read_text("utf-8"))
    (torn / "evaluation_rows.json").write_text(json.dumps(rows | {"rows": rows["rows"][:3]}), encoding="utf-8")
    (torn / "report.html").write_text("the page of this run", encoding="utf-8")
    assert report_verb([str(torn), str(good)], None, None, None) == 2
    assert (torn / "report.html").read_text("utf-8") == "the page of this run"
    assert not (good / "report.html").exists()
    assert "page:" not in capsys.readouterr().out


def test_runs_of_the_same_name_are_named_by_their_paths(tmp_path: Path) -> None:
    folders = [str(write_run(tmp_path / place / "first")) for place in ("x", "y")]
    files = [str(tmp_path / f"both.{name}") for name in ("html", "json", "csv")]
    report_verb(folders, *files)
    assert [run["name"] for run in json.loads(Path(files[1]).read_text("utf-8"))["runs"]] == folders
    assert f"{folders[1]} and {folders[0]} cannot be distinguished" in Path(files[0]).read_text("utf-8")


@pytest.mark.parametrize("output", ["html", "json", "csv"])
def test_no_output_replaces_the_rows_or_the_recipe_of_a_run(output: str, tmp_path: Path) -> None:
    folder, rows = write_run(tmp_path / "run"), tmp_path / "rows.jsonl"
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    plan["recipe"] |= {"data": {"train": [{"path": str(rows)}]}}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "recipe.yaml").touch()
    rows.write_text("mine", encoding="utf-8")
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_config.json").touch()
    parts = ("recipe.yaml", "plan.json", "metrics.jsonl", "adapter/adapter_config.json")
    for file in (rows, *(folder / part for part in parts)):
        files = {"html": None, "json": None, "csv": None} | {output: str(file)}
        before = file.read_bytes()
        with pytest.raises(InputError, match=rf"--{output} .* would replace"):
            report_verb([str(folder)], *files.values())
        assert file.read_bytes() == before


def test_runs_are_listed_with_what_became_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a" / "good")
    killed = write_run(tmp_path / "b", steps=7, finished=False)
    going = write_run(tmp_path / "c", finished=False)
    lock = FolderLock(going)
    runs_verb(str(tmp_path), "-")
    good, dead, live = json.loads(capsys.readouterr().out)
    assert [Path(line["path"]).name for line in (good, dead, live)] == ["good", "b", "c"]
    assert [line["state"] for line in (good, dead, live)] == ["finished", "killed; continue with --resume", "running"]
    assert dead["steps"] == 7
    assert good["eval_loss"] < 2.6
    for run, line in ((killed, dead), (going, live)):
        report_verb([str(run)], None, "-", None)
        assert json.loads(capsys.readouterr().out)["runs"][0]["state"] == line["state"]
        assert f"State: {line['state']}." in (run / "report.html").read_text()
    lock.release()
    assert not is_held(going)
    assert not is_held(killed)
    (tmp_path / "none").mkdir()
    runs_verb(str(tmp_path / "none"), None)
    assert "no runs in" in capsys.readouterr().out
    with pytest.raises(InputError, match="no folder"):
        runs_verb(str(tmp_path / "nowhere"), None)


def test_the_result_is_that_of_the_exported_weights_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiles, banner, answers, comparison and list: neither the last evaluation nor the lowest loss of another metric's
    best step."""
    folder = write_run(tmp_path / "best", best_step=20, eval_loss=2.125)
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    samples = [{"prompt": "<|user|>cakes?", "reference": "two lemon cakes", "answer": "of step 20"}]
    best = {"step": 20, "eval": {"loss": 2.125, "exact_match": 0.875}, "samples": samples}
    lower = {"step": 30, "eval": {"loss": 1.0625, "exact_match": 0.5}}
    lines[-1:-1] = [json.dumps(best), json.dumps(lower)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report_verb([str(folder)], None, None, None)
    page = (folder / "report.html").read_text("utf-8")
    tiles = page[page.index("evaluation loss") :][:600]
    assert "2.125" in tiles
    assert "0.875" in tiles
    assert "Evaluation loss 2.6 before training, 2.125 with the exported weights." in page
    assert "of step 20" in page
    report_verb([str(folder), str(write_run(tmp_path / "other"))], None, str(tmp_path / "both.json"), None)
    outcome = json.loads((tmp_path / "both.json").read_text("utf-8"))["runs"][0]["outcome"]
    assert (outcome["eval loss"], outcome["eval exact_match"]) == (2.125, 0.875)
    capsys.readouterr()
    runs_verb(str(tmp_path), "-")
    assert json.loads(capsys.readouterr().out)[0]["eval_loss"] == 2.125


def test_only_what_is_not_needed_any_more_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from tunekit.artifacts.checkpoint import list_checkpoints, save_checkpoint
    from tunekit.artifacts.run import RunFolder

    def steps(run: Path) -> list[int]:
        return [step for step, _ in list_checkpoints(run / "checkpoints")]

    done, killed = (write_run(tmp_path / name, finished=name == "done") for name in ("done", "killed"))
    for path in (done, killed):
        run = RunFolder.open_resume(path)
        for step in (5, 10):
            save_checkpoint(run, step, {"w": torch.zeros(3)}, {}, keep=2)
        run.close()
    with pytest.raises(InputError, match="nothing was removed"):
        clean_verb(str(tmp_path), yes=False)
    assert "step-000010, step-000005" in capsys.readouterr().out
    held = FolderLock(killed)
    clean_verb(str(tmp_path), yes=True)
    assert (steps(done), steps(killed)) == ([], [10, 5])
    held.release()
    clean_verb(str(tmp_path), yes=True)
    assert steps(killed) == [10]
    clean_verb(str(tmp_path), yes=True)
    assert "nothing to remove" in capsys.readouterr().out


def test_the_best_checkpoint_of_an_unfinished_run_stays(tmp_path: Path) -> None:
    """The end of the run may export it."""
    import torch

    from tunekit.artifacts.checkpoint import list_checkpoints, save_checkpoint
    from tunekit.artifacts.run import RunFolder

    killed = write_run(tmp_path / "killed", finished=False)
    with RunFolder.open_resume(killed) as run:
        for step in (5, 10, 15):
            save_checkpoint(run, step, {"w": torch.zeros(3)}, {"loop": {"best_step": 5}}, keep=3)
    clean_verb(str(tmp_path), yes=True)
    assert [step for step, _ in list_checkpoints(killed / "checkpoints")] == [15, 5]


def test_the_newest_whole_checkpoint_stays_and_foreign_folders_too(tmp_path: Path) -> None:
    """A resume passes over a damaged one for the one before it."""
    import torch

    from tunekit.artifacts.checkpoint import save_checkpoint
    from tunekit.artifacts.run import RunFolder

    killed = write_run(tmp_path / "killed", finished=False)
    with RunFolder.open_resume(killed) as run:
        for step in (5, 10, 15):
            save_checkpoint(run, step, {"w": torch.zeros(3)}, {}, keep=3)
    places = [killed / "checkpoints" / f"step-0000{step}" for step in ("05", "10", "15")]
    (places[2] / "tensors.safetensors").write_bytes(bytes((places[2] / "tensors.safetensors").stat().st_size))
    foreign = tmp_path / "foreign" / "checkpoints" / "step-000001"
    foreign.mkdir(parents=True)
    for name, text in (("plan.json", "[1]"), ("recipe.yaml", "x"), ("status.json", '{"exit_code": 0}')):
        (tmp_path / "foreign" / name).write_text(text, encoding="utf-8")
    (tmp_path / "torn").mkdir()
    for name in ("plan.json", "recipe.yaml", "status.json"):
        (tmp_path / "torn" / name).write_text("{", encoding="utf-8")
    clean_verb(str(tmp_path), yes=True)
    assert [each.exists() for each in (*places, foreign)] == [False, True, True, True]
    runs_verb(str(tmp_path), str(tmp_path / "runs.json"))
    lines = json.loads((tmp_path / "runs.json").read_text("utf-8"))
    assert [Path(line["path"]).name for line in lines] == ["foreign", "killed"]


def test_a_resume_that_goes_back_is_watched_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where between two looks the log has grown past where it was."""
    going = write_run(tmp_path / "going", finished=False)
    lines = (going / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    again = [json.dumps(json.loads(line) | {"loss": 9.5}).encode() + b"\n" for line in lines[2:]]
    (going / "metrics.jsonl").write_bytes(b"".join(lines[:5]))
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0)
    lock, records = FolderLock(going), watch._records(going)
    first = [next(records) for _ in range(5)]
    (going / "metrics.jsonl").write_bytes(b"".join([*lines[:2], *again[:6]]))
    lock.release()
    assert first[:2] == [watch._record(json.loads(line)) for line in lines[:2]]
    assert list(records) == [watch._record(json.loads(line)) for line in again[:6]]


def test_a_run_is_watched_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From another thread: what is there at first, what comes, and how it ended."""
    going = write_run(tmp_path / "going", finished=False)
    lines = (going / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (going / "metrics.jsonl").write_bytes(b"".join(lines[:10]))
    lock = FolderLock(going)
    watching = threading.Thread(target=watch_verb, args=(str(going), None))
    watching.start()
    time.sleep(0.2)
    with (going / "metrics.jsonl").open("ab") as file:
        file.write(b"".join(lines[10:]))
    (going / "status.json").write_text('{"exit_code": 0, "reason": "finished"}', encoding="utf-8")
    watching.join(timeout=10)
    lock.release()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("going: running")
    assert shown[1].startswith("step 0  eval  exact_match 0.3846  loss 2.6")
    assert shown[-1].endswith("going: finished")
    assert any(line.startswith("step 40/40  loss") for line in shown)


def test_a_stopped_run_has_no_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """80 steps of 1.5 seconds: after the 40th a minute, as long as its process lives."""
    folder = write_run(tmp_path / "half", finished=False)
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    (folder / "plan.json").write_text(json.dumps(plan | {"steps": 80}), encoding="utf-8")
    lock = FolderLock(folder)
    assert "1 min 00 s" in html_page(run_report(run_values(folder)))
    watching = threading.Thread(target=watch_verb, args=(str(folder), None))
    watching.start()
    time.sleep(0.2)
    lock.release()
    watching.join(timeout=10)
    shown = capsys.readouterr().out
    assert "1m58s left" in shown.splitlines()[2]
    assert "left" not in shown.splitlines()[3]
    assert "time left" not in html_page(run_report(run_values(folder)))
    watch_verb(str(folder), None)
    shown = capsys.readouterr().out
    assert "step 40/80" in shown
    assert "left" not in shown


def test_the_page_of_a_running_run_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going, found = write_run(tmp_path / "going", finished=False), []

    def look(self: ThreadingHTTPServer) -> None:
        host, port = self.server_address[:2]
        thread = threading.Thread(target=lambda: [self.handle_request() for _ in range(3)])
        thread.start()
        for place, name in (("", f"localhost:{port}"), ("nothing", f"{host}"), ("", "elsewhere.example")):
            try:
                with urlopen(Request(f"http://{host}:{port}/{place}", headers={"Host": name})) as reply:
                    found.append((reply.status, reply.read().decode()))
            except HTTPError as error:
                found.append((error.code, ""))
        thread.join()

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", look)
    watch_verb(str(going), 0)
    assert [status for status, _ in found] == [200, 404, 403]  # the last one asked for another machine's page
    assert "<title>going</title>" in found[0][1]
    assert "refresh" in found[0][1]


def test_the_page_has_a_limit_of_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that send nothing have a thread each; those beyond the limit wait, and are answered afterwards."""
    going, statuses = write_run(tmp_path / "going", finished=False), []

    def look(self: ThreadingHTTPServer) -> None:
        host, port = self.server_address[:2]
        before = threading.active_count()
        thread = threading.Thread(target=lambda: [self.handle_request() for _ in range(4)])
        thread.start()
        silent = [socket.create_connection((host, port)) for _ in range(3)]
        time.sleep(0.5)
        assert threading.active_count() - before == 3  # this thread's, and two of the connections
        for each in silent:
            each.close()
        with urlopen(Request(f"http://{host}:{port}/", headers={"Host": "localhost"})) as reply:
            statuses.append(reply.status)
        thread.join()

    monkeypatch.setattr(watch._Server, "free", threading.Semaphore(2))
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", look)
    watch.watch_verb(str(going), 0)
    assert statuses == [200]
