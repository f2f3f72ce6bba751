"""`tunekit sweep`: each trial ends in the same bytes as its own `tunekit train`, whatever happens to the others."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.train_case import (
    Ended,
    in_child,
    kill_self,
    lose_the_end,
    records,
    result_bytes,
    train_in_child,
    without_times,
    write_recipe,
)
from tunekit.errors import InputError, NumericsError, RecipeError, ResourceError, RunFolderError
from tunekit.files import durable
from tunekit.files.durable import write_json
from tunekit.planning.announce import summary
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.trial_recipes import load_sweep
from tunekit.training import sweep_folder

KEYS = {"training.learning_rate": [0.001, 0.01], "adapter.method": ["lora", "dora"]}
TRIALS = [f"learning_rate={rate},method={method}" for rate in (0.001, 0.01) for method in ("lora", "dora")]
SHORT = {"epochs": None, "max_steps": 4}
JOINED_NOTE = "the rows of this run are joined with other trials of a sweep, 2 in all"  # of an older version's plan


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["TUNEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("sweep"), tiny_llama, training=SHORT, sweep={"keys": KEYS})


@pytest.fixture(scope="module")
def solo(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of each trial by `tunekit train`."""
    folder = tmp_path_factory.mktemp("solo")
    runs = {}
    for trial in load_sweep(str(recipe)).trials:
        overrides = [f"{key}={value}" for key, value in trial.values.items()]
        ended = train_in_child(recipe, folder / trial.name, *overrides)
        assert ended.code == 0, ended.output
        runs[trial.name] = folder / trial.name
    return runs


def sweep(
    recipe: Path, folder: Path, *overrides: str, resume: bool = False, before: Callable[[], None] = lambda: None
) -> Ended:
    """`tunekit sweep RECIPE output.dir=FOLDER OVERRIDES [--resume]`; `before` runs in the child first."""

    def work() -> None:
        from tunekit.sweep import sweep_verb

        sweep_verb(load_sweep(str(recipe), [f"output.dir={folder}", *overrides]), resume, None)

    return in_child(work, folder.parent / f"{folder.name}.log", before)


def weights(run: Path) -> dict[str, bytes]:
    """The adapter's files, except tunekit.json, which contains the way from this folder to the base."""
    return {name: value for name, value in result_bytes(run).items() if name != "tunekit.json"}


def assert_equal_to_solo(folder: Path, solo: dict[str, Path]) -> None:
    for name, run in solo.items():
        assert weights(folder / name) == weights(run), name
        assert without_times(records(folder / name)) == without_times(records(run)), name


def results_of(folder: Path) -> Any:
    return json.loads((folder / "sweep.json").read_text("utf-8"))


def at_save(number: int, action: Callable[[], Any]) -> Callable[[], None]:
    """Makes a child call `action` in place of its checkpoint with this number, from 0."""

    def install() -> None:
        from tunekit.training.run import Run

        save, count = Run.save, 0

        def counted(run: Run) -> None:
            nonlocal count
            count += 1
            if count - 1 == number:
                action()
            save(run)

        Run.save = counted  # type: ignore[method-assign]

    return install


@pytest.mark.slow
def test_trials_equal_their_solo_runs(recipe: Path, solo: dict[str, Path], tmp_path: Path) -> None:
    ended = sweep(recipe, tmp_path / "all")
    assert ended.code == 0, ended.output
    assert list(solo) == TRIALS
    assert_equal_to_solo(tmp_path / "all", solo)
    assert ended.output.count("loading ") == 1
    assert "the base is loaded once instead of 4 times" in ended.output
    results = results_of(tmp_path / "all")
    losses = [setting["mean"] for setting in results["settings"]]
    assert losses == sorted(losses)
    assert results["settings"][0]["setting"] in results["verdict"]
    assert sorted(results["trials"]) == sorted(TRIALS)
    assert results["verdict"] in (tmp_path / "all" / "sweep.html").read_text("utf-8")
    again = sweep(recipe, tmp_path / "all", resume=True)
    assert again.code == 0, again.output
    assert "4 of 4 trials have ended already" in again.output
    assert results_of(tmp_path / "all") == results
    added = sweep(recipe, tmp_path / "all", "training.learning_rate=0.001,0.01,0.02", resume=True)
    assert added.code == 0, added.output
    assert "4 of 6 trials have ended already" in added.output
    assert len(results_of(tmp_path / "all")["settings"]) == 6
    refused = sweep(recipe, tmp_path / "all")
    assert refused.code == 2
    assert "already holds a sweep; add --resume" in refused.output


@pytest.mark.drawn
def test_train_continues_the_folder_of_a_trial(recipe: Path, solo: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "all"
    assert sweep(recipe, folder, "training.keep_checkpoints=2", "~sweep.keys.adapter.method").code == 0
    run = folder / "learning_rate=0.01"
    whole = result_bytes(run)
    assert weights(run) == weights(solo["learning_rate=0.01,method=lora"])
    lose_the_end(run)
    ended = train_in_child(run / "recipe.yaml", run, resume=True)
    assert ended.code == 0, ended.output
    assert "resuming after step 2 of 4" in ended.output
    assert result_bytes(run) == whole


@pytest.mark.slow
@pytest.mark.parametrize("action", [kill_self, lambda: os.kill(os.getpid(), signal.SIGINT)], ids=["kill", "interrupt"])
@pytest.mark.parametrize("save", [2, 5], ids=["first", "last"])
def test_an_interrupted_sweep_resumes(
    action: Callable[[], Any], save: int, recipe: Path, solo: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    ended = sweep(recipe, folder, before=at_save(save, action))
    assert ended.code == (-signal.SIGKILL if action is kill_self else 130), ended.output
    assert not (folder / TRIALS[-1] / "adapter").exists()
    fewer = sweep(recipe, folder, "sweep.keys={adapter.method: [lora]}", resume=True)
    assert fewer.code == 2
    assert "holds a sweep with other trials" in fewer.output
    resumed = sweep(recipe, folder, resume=True)
    assert resumed.code == 0, resumed.output
    assert_equal_to_solo(folder, solo)


@pytest.mark.drawn
def test_a_full_folder_ends_only_its_trial(recipe: Path, solo: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "all"

    def fill() -> None:
        perform = durable.perform

        def full(kind: str, path: Path, work: Callable[[], Any]) -> Any:
            if TRIALS[1] in str(path) and "step-000004" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return perform(kind, path, work)

        durable.perform = full

    ended = sweep(recipe, folder, before=fill)
    assert ended.code == 4, ended.output
    assert "1 of 4 trials are not finished; continue with --resume" in ended.output
    assert_equal_to_solo(folder, {name: run for name, run in solo.items() if name != TRIALS[1]})
    resumed = sweep(recipe, folder, resume=True)
    assert resumed.code == 0, resumed.output
    assert_equal_to_solo(folder, solo)


@pytest.mark.drawn
def test_invalid_numbers_and_an_early_stop_end_only_their_trial(
    recipe: Path, solo: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    rates = "training.learning_rate=1e38,30.0,0.01"
    more = (rates, "~sweep.keys.adapter.method", "training.eval_steps=1", "evaluation.patience=2")
    ended = sweep(recipe, folder, *more)
    assert ended.code == 0, ended.output
    assert json.loads((folder / "learning_rate=1e+38" / "status.json").read_text())["exit_code"] == 3
    assert json.loads((folder / "learning_rate=30" / "status.json").read_text())["reason"].startswith("stopped early")
    assert weights(folder / "learning_rate=0.01") == weights(solo["learning_rate=0.01,method=lora"])
    results = results_of(folder)
    assert results["settings"][0]["setting"] == "learning_rate=0.01"
    assert [setting["mean"] is None for setting in results["settings"]] == [False, False, True]
    first = "# best of a sweep in which not every run is finished: learning_rate=1e+38 ("
    assert (folder / "best.yaml").read_text("utf-8").startswith(first)
    assert load_recipe(folder / "best.yaml").recipe.training.learning_rate == 0.01
    before = (folder / "learning_rate=1e+38" / "metrics.jsonl").stat().st_mtime_ns
    assert sweep(recipe, folder, *more, resume=True).code == 0
    assert (folder / "learning_rate=1e+38" / "metrics.jsonl").stat().st_mtime_ns == before
    alone = sweep(recipe, tmp_path / "alone", "training.learning_rate=1e38,1e37", "~sweep.keys.adapter.method")
    assert alone.code == 3, alone.output
    again = sweep(
        recipe, tmp_path / "alone", "training.learning_rate=1e38,1e37", "~sweep.keys.adapter.method", resume=True
    )
    assert (again.code, again.output.count("not finite")) == (3, 2), again.output
    changed = ("training.learning_rate=1e38,1e37", "~sweep.keys.adapter.method", "training.warmup_ratio=0.5")
    assert "training.warmup_ratio" in sweep(recipe, tmp_path / "alone", *changed, resume=True).output


@pytest.mark.drawn
def test_keys_of_the_base_divide_passes(recipe: Path, tmp_path: Path) -> None:
    more = ("~sweep.keys.adapter.method", "model.dtype=float32,bfloat16")
    ended = sweep(recipe, tmp_path / "all", *more)
    assert ended.code == 0, ended.output
    assert "the base is loaded 2 times instead of 4 times" in ended.output
    assert ended.output.count("loading ") == 2
    for dtype in ("float32", "bfloat16"):
        overrides = ("training.learning_rate=0.01", f"model.dtype={dtype}")
        assert train_in_child(recipe, tmp_path / dtype, *overrides).code == 0
        run = tmp_path / "all" / f"learning_rate=0.01,dtype={dtype}"
        assert weights(run) == weights(tmp_path / dtype)


@pytest.mark.drawn
def test_seeds_give_a_spread(recipe: Path, tmp_path: Path) -> None:
    shutil.copy(recipe.parent / "train.jsonl", recipe.parent / "eval.jsonl")
    ended = sweep(recipe, tmp_path / "all", "sweep.seeds=2", "~sweep.keys.adapter.method", "data.eval=0.5")
    assert ended.code == 0, ended.output
    assert ended.output.count("parameters trained") == 1  # the same for all trials
    best, other = results_of(tmp_path / "all")["settings"]
    assert [run["name"] for run in best["runs"]] == [f"{best['setting']},seed=0", f"{best['setting']},seed=1"]
    outcomes = [run["outcome"] for run in best["runs"]]
    assert best["mean"] == pytest.approx(sum(outcomes) / 2)
    assert best["spread"] == pytest.approx(abs(outcomes[0] - outcomes[1]) / 2**0.5)
    assert other["difference"]["low"] <= other["difference"]["value"] - other["difference"]["than_value"]


@pytest.mark.drawn
def test_folds_evaluate_each_row_once(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    more = ("sweep.folds=3", "~sweep.keys.adapter.method", "data.train.0.max_rows=20")
    ended = sweep(recipe, folder, *more)
    assert ended.code == 0, ended.output
    assert (
        "each trial trains without one of 3 folds, and is evaluated on this fold; data.eval is not used" in ended.output
    )
    best, other = results_of(folder)["settings"]
    assert [run["name"] for run in best["runs"]] == [f"{best['setting']},fold={fold}" for fold in (1, 2, 3)]
    outcomes = [run["outcome"] for run in best["runs"]]
    assert best["mean"] == pytest.approx(sum(outcomes) / 3)
    rows = [json.loads((folder / run["name"] / "evaluation_rows.json").read_text())["digests"] for run in best["runs"]]
    assert len({digest for each in rows for digest in each}) == other["difference"]["rows"]
    run = folder / best["runs"][0]["name"]
    whole = result_bytes(run)
    lose_the_end(run)
    again = train_in_child(run / "recipe.yaml", run, resume=True)
    assert again.code == 0, again.output
    assert result_bytes(run) == whole


def test_a_fault_of_the_rows_is_shown_once(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": 5}\n', encoding="utf-8")
    wrong = (
        "~sweep.keys.adapter.method",
        "training.learning_rate=0.001,0.01,0.02",
        f"data.train={tmp_path}/rows.jsonl",
    )
    ended = sweep(recipe, tmp_path / "all", *wrong, "data.eval=0.5")
    assert ended.code == 2
    assert ended.output.count("rows.jsonl:2") == 1
    assert "learning_rate=0.01)" not in ended.output
    for _ in range(2):  # a sweep that was refused can be started again
        assert "'text' must be text" in sweep(recipe, tmp_path / "folds", *wrong, "sweep.folds=2").output
    some = sweep(recipe, tmp_path / "all", "adapter.target_modules=nothing,all-linear")
    assert some.output.count("nothing is no") + some.output.count("'nothing'") == 1
    assert "(learning_rate=0.001,method=lora,target_modules=nothing, " in some.output


@pytest.mark.drawn
@pytest.mark.parametrize("save", [None, 1, 5])
def test_halving_ends_the_worse_half(save: int | None, recipe: Path, tmp_path: Path) -> None:
    """The best trial equals its solo run, also after a kill in the first or second rung."""
    folder = tmp_path / "all"
    more = ("training.learning_rate=0,1e-4,1e-3,1e-2", "~sweep.keys.adapter.method", "sweep.strategy=halving")
    more += ("training.max_steps=8", "training.save_steps=8", "training.eval_steps=1")
    ended = sweep(recipe, folder, *more, before=(lambda: None) if save is None else at_save(save, kill_self))
    if save is not None:
        assert ended.code == -signal.SIGKILL
        ended = sweep(recipe, folder, *more, resume=True)
    assert ended.code == 0, ended.output
    last = {name: records(folder / f"learning_rate={name}")[-1]["step"] for name in ("0", "0.0001", "0.001", "0.01")}
    assert last == {"0": 2, "0.0001": 2, "0.001": 4, "0.01": 8}
    ends = [(run["state"], run["reason"]) for each in results_of(folder)["settings"] for run in each["runs"]]
    assert ends[0] == ("finished", "finished")
    assert ends[1:] == [("ended by halving", f"ended by halving after step {step}") for step in (4, 2, 2)]
    solo = train_in_child(recipe, tmp_path / "solo", "training.learning_rate=0.01", *more[3:])
    assert solo.code == 0, solo.output
    assert weights(folder / "learning_rate=0.01") == weights(tmp_path / "solo")
    again = sweep(recipe, folder, *more, resume=True)
    assert again.code == 0, again.output
    assert "4 of 4 trials have ended already" in again.output
    finished = sweep(recipe, folder, *more, "adapter.r=4,8", resume=True)
    (folder / "sweep.json").unlink()
    other = sweep(recipe, folder, *more, "adapter.r=4,8", resume=True)
    assert (finished.code, other.code) == (2, 2)
    assert "holds a sweep with other trials" in finished.output
    assert "halving compared the trials of a different sweep" in other.output
    late = sweep(recipe, tmp_path / "late", *more[:-1], "training.eval_steps=8")
    assert late.code == 2
    assert "lower training.eval_steps" in late.output


@pytest.mark.drawn
def test_auto_stays_within_its_time(tiny_llama: Path, tmp_path: Path) -> None:
    """From the recipe that init wrote to a chosen model; a resume keeps the chosen values."""
    rows = [{"prompt": f"{at} and {at} is", "completion": f" {2 * at}"} for at in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "auto"
    overrides = [f"output.dir={folder}", "training.learning_rate=1e-3"]

    def write() -> None:
        from tunekit.init import init_verb

        init_verb(str(tmp_path / "rows.jsonl"), str(recipe), str(tiny_llama), None, "none", None)

    def automatic(resume: bool = False) -> Callable[[], None]:
        def work() -> None:
            from tunekit.recipe.load import load_recipe
            from tunekit.sweep import automatic_verb
            from tunekit.training import automatic

            automatic.LENGTHS, automatic.RATES, automatic.RANKS = ((1, 2),), ((1, 3),), ((1,),)
            automatic_verb(load_recipe(recipe, overrides), str(recipe), overrides, 1e6, resume, None)

        return work

    assert in_child(write, tmp_path / "init.log").code == 0
    killed = in_child(automatic(), tmp_path / "killed.log", at_save(3, kill_self))
    assert killed.code == -signal.SIGKILL
    assert (
        "--auto tries 4 trials by halving: training.epochs 3, 6; training.learning_rate 0.001, 0.003" in killed.output
    )
    ended = in_child(automatic(resume=True), tmp_path / "auto.log")
    assert ended.code == 0, ended.output
    results = results_of(folder)
    assert [run["state"] for setting in results["settings"] for run in setting["runs"]].count("finished") == 1
    best = results["settings"][0]
    text = (folder / "best.yaml").read_text("utf-8")
    assert f"epochs: {results['trials'][best['setting']]['training.epochs']}" in text
    assert "dir: ./best" in text


def test_problems_of_all_trials_come_before_the_first(recipe: Path, tmp_path: Path) -> None:
    ended = sweep(recipe, tmp_path / "all", "adapter.target_modules=nothing,nowhere", "~sweep.keys.adapter.method")
    assert ended.code == 2
    assert "nothing" in ended.output
    assert "nowhere" in ended.output
    assert not (tmp_path / "all" / "learning_rate=0.001,target_modules=nothing").exists()


def refused(recipe: Path, json_file: Path | None, *overrides: str) -> str:
    """The message of a sweep that is refused before anything is planned."""
    from tunekit.sweep import sweep_verb

    with pytest.raises(InputError) as error:
        sweep_verb(load_sweep(str(recipe), overrides), False, None if json_file is None else str(json_file))
    return str(error.value)


def test_a_sweep_writes_over_no_file_that_a_trial_reads(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": [{"path": "train.jsonl"}]})
    other = tmp_path / "other.jsonl"
    shutil.copy(tmp_path / "train.jsonl", other)
    sources = f"data.train={tmp_path / 'train.jsonl'},{other}"
    assert "would replace data.train" in refused(recipe, other, sources)
    best = tmp_path / "best.yaml"
    recipe.rename(best)
    text = best.read_text("utf-8")
    assert "would replace the recipe" in refused(best, None, "adapter.r=2,3", f"output.dir={tmp_path}")
    assert best.read_text("utf-8") == text


def test_folds_are_of_another_sweep_if_a_run_has_begun(tmp_path: Path) -> None:
    (tmp_path / "folds").mkdir()
    sweep_folder.open_sweep(tmp_path, [], resume=False).release()
    (tmp_path / "r=2" / "checkpoints").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="already holds a sweep"):
        sweep_folder.open_sweep(tmp_path, [], resume=False)


def test_the_folder_of_a_run_is_refused_with_a_cure_that_sweep_has(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    message = refused(recipe, None, "adapter.r=2,3", f"output.dir={tmp_path / 'run'}")
    assert "run already holds a run (checkpoints); choose another output.dir, such as output.dir=" in message
    assert message.endswith("run-sweep")


@pytest.mark.parametrize("name", ["sweep.json", "rungs.json", "auto.json", "best.yaml", "folds"])
def test_the_folder_of_another_sweep_is_refused(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / name).write_text("mine")
    message = refused(recipe, None, "adapter.r=2,3", f"output.dir={tmp_path / 'all'}")
    assert message.endswith("all already holds a sweep; add --resume, or choose another output.dir")
    assert (tmp_path / "all" / name).read_text() == "mine"


def test_a_resume_keeps_the_trials_of_a_sweep(tmp_path: Path) -> None:
    """A table without them would replace the table of that sweep."""
    write_json(tmp_path / "sweep.json", {"trials": {"r=2": {}, "r=4": {}}})
    trials: Any = [SimpleNamespace(recipe=SimpleNamespace(name=name), path=tmp_path / name) for name in ("r=4", "r=8")]
    with pytest.raises(
        RunFolderError, match=r"holds a sweep with other trials \(r=2\); write all values of that sweep"
    ):
        sweep_folder.open_sweep(tmp_path, trials, resume=True)
    trials += [SimpleNamespace(recipe=SimpleNamespace(name="r=2"), path=tmp_path / "r=2")]
    sweep_folder.open_sweep(tmp_path, trials, resume=True).release()


@pytest.mark.drawn
def test_a_resume_refuses_trials_that_an_older_version_joined(tiny_llama: Path, tmp_path: Path) -> None:
    """Their notes name it. Trials of `sweep.joined: auto` that ran separately, and finished ones, do not matter."""
    recipe, folder = write_recipe(tmp_path, tiny_llama, training=SHORT), tmp_path / "all"
    ended = sweep(recipe, folder, "adapter.r=2,4", before=at_save(3, kill_self))  # r=2 is finished, r=4 is not
    assert ended.code == -signal.SIGKILL, ended.output
    separate = {name: json.loads((folder / name / "plan.json").read_text("utf-8")) for name in ("r=2", "r=4")}
    for name, plan in separate.items():
        write_json(folder / name / "plan.json", {**plan, "notes": [*plan["notes"], JOINED_NOTE]})
    ended = sweep(recipe, folder, "adapter.r=2,4", resume=True)
    assert ended.code == 2, ended.output
    assert f"{folder} holds trials that an older version began with joined rows (sweep.joined" in ended.output
    assert "with the same bytes (r=4); choose another output.dir, such as output.dir=" in ended.output
    write_json(folder / "r=4" / "plan.json", separate["r=4"])
    ended = sweep(recipe, folder, "adapter.r=2,4", resume=True)
    assert ended.code == 0, ended.output
    assert train_in_child(recipe, tmp_path / "solo", "adapter.r=4").code == 0
    assert weights(folder / "r=4") == weights(tmp_path / "solo")


def test_a_joined_trial_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    trial: Any = SimpleNamespace(path=tmp_path / "r=2")
    sweep_folder.refuse_joined(trial)  # it has no folder
    trial.path.mkdir()
    write_json(trial.path / "plan.json", {"notes": [JOINED_NOTE]})
    sweep_folder.refuse_joined(trial)
    (trial.path / "checkpoints" / "step-000002").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="began with joined rows"):
        sweep_folder.refuse_joined(trial)


def test_the_folders_of_all_trials_are_checked_first(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    for folder in ("r=3", "r=2"):
        (tmp_path / "all" / folder).mkdir(parents=True)
    (tmp_path / "all" / "r=3" / "report.md").write_text("mine")
    message = refused(recipe, None, "adapter.r=2,3", f"output.dir={tmp_path / 'all'}")
    assert "r=3 contains report.md" in message
    assert [path.name for path in (tmp_path / "all" / "r=2").iterdir()] == []


def test_the_disk_must_have_room_for_all_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of all trials, and a second copy of the largest."""
    trials: Any = [SimpleNamespace(session=size, plan=1, planned=1) for size in (100, 300)]
    monkeypatch.setattr(sweep_folder, "folder_bytes", lambda session, plan, planned: session)
    monkeypatch.setattr(sweep_folder, "free_bytes", lambda path: 700)
    sweep_folder.require_space(tmp_path, trials)
    monkeypatch.setattr(sweep_folder, "free_bytes", lambda path: 699)
    with pytest.raises(ResourceError, match="has 699 bytes free, but 2 trials need 700 bytes"):
        sweep_folder.require_space(tmp_path, trials)


def test_auto_refuses_a_recipe_before_it_loads_the_model(tmp_path: Path) -> None:
    from tunekit.recipe.load import load_recipe
    from tunekit.sweep import automatic_verb

    recipe = write_recipe(tmp_path, tmp_path / "no model")
    for override, words in (
        ("data.eval=null", "set data.eval"),
        ("sweep.keys={adapter.r: [2, 4]}", "remove sweep.keys"),
    ):
        with pytest.raises(RecipeError, match=words):
            automatic_verb(load_recipe(recipe, [override]), str(recipe), [override], 1.0, False, None)


@pytest.mark.drawn
def test_a_resume_refuses_trials_of_other_rows(tiny_llama: Path, tmp_path: Path) -> None:
    recipe, folder = write_recipe(tmp_path, tiny_llama, training=SHORT), tmp_path / "all"
    assert sweep(recipe, folder, "adapter.r=2,4").code == 0
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text("utf-8") * 2, encoding="utf-8")
    before = results_of(folder)
    ended = sweep(recipe, folder, "adapter.r=2,4,8", resume=True)
    assert ended.code == 2
    assert "r=2 was trained on rows that have changed since" in ended.output
    assert results_of(folder) == before


def test_the_summary_of_one_trial_counts_no_loads() -> None:
    assert summary(1, 30, 1, together=False) == "1 trial, 30 steps"
    text = "2 trials that run one after another, 60 steps in all; the base is loaded once instead of 2 times"
    assert summary(2, 60, 1, together=False) == text


def test_the_last_error_repeats_no_error_of_a_trial() -> None:
    from tunekit.sweep import _raise_errors

    trials: Any = [SimpleNamespace(error=error) for error in (ResourceError("the disk is full"), None)]
    with pytest.raises(ResourceError) as error:
        _raise_errors(trials)
    assert str(error.value) == "1 of 2 trials are not finished; continue with --resume"
    trials = [SimpleNamespace(error=NumericsError("step 3: the loss is not finite"))]
    with pytest.raises(NumericsError) as invalid:
        _raise_errors(trials)
    assert "step 3" not in str(invalid.value)
