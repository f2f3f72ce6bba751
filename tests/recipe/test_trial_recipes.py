"""The trials of a recipe: their values, names and seeds, and every problem with its place."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tunekit.errors import RecipeError
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.trial_recipes import fold_file, load_sweep

RECIPE = """\
model: org/base
data: {train: rows/train.jsonl, eval: 0.1}
training: {seed: 5, epochs: 2}
output: {dir: runs/x}
"""


def write(folder: Path, sweep: str = "") -> str:
    (folder / "recipe.yaml").write_text(RECIPE + sweep, encoding="utf-8")
    return str(folder / "recipe.yaml")


def problems(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_sweep(path, overrides)
    return [str(problem).removeprefix(path) for problem in error.value.problems]


def test_a_grid_of_the_file_and_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "sweep:\n  keys: {training.learning_rate: [1e-4, 3e-4], adapter.r: [8]}\n")
    sweep = load_sweep(path, ["adapter.r=4,16", "data.max_length=99"])
    names = [trial.name for trial in sweep.trials]
    assert names == [f"learning_rate={rate},r={r}" for rate in ("0.0001", "0.0003") for r in (4, 16)]
    recipes = [trial.loaded.recipe for trial in sweep.trials]
    pairs = [(recipe.training.learning_rate, recipe.adapter.model_dump()["r"]) for recipe in recipes]
    assert pairs == [(1e-4, 4), (1e-4, 16), (3e-4, 4), (3e-4, 16)]
    assert {recipe.data.max_length for recipe in recipes} == {99}
    assert [recipe.output.dir for recipe in recipes] == [str(tmp_path / "runs/x" / name) for name in names]
    assert all(recipe.sweep is None for recipe in recipes)


def test_a_trial_is_the_recipe_with_its_values(tmp_path: Path) -> None:
    path = write(
        tmp_path, "sweep: {keys: {adapter: [ia3, {method: lora, r: 4}], data.train: [a.jsonl, sub/b.jsonl]}}\n"
    )
    trials = load_sweep(path).trials
    assert [trial.name for trial in trials] == [
        "adapter=ia3,train=a.jsonl",
        "adapter=ia3,train=sub-b.jsonl",
        "adapter=method-lora-r-4,train=a.jsonl",
        "adapter=method-lora-r-4,train=sub-b.jsonl",
    ]
    for trial, (method, file) in zip(
        trials, product(["ia3", "{method: lora, r: 4}"], ["a.jsonl", "sub/b.jsonl"]), strict=True
    ):
        folder = trial.loaded.recipe.output.dir
        overrides = [f"adapter={method}", f"data.train={tmp_path / file}", f"output.dir={folder}"]
        assert trial.loaded.recipe == load_recipe(path, overrides).recipe


def test_a_recipe_can_be_incomplete_without_its_trials(tmp_path: Path) -> None:
    trials = load_sweep(write(tmp_path), ["training.epochs=null", "training.max_steps=2,3"]).trials
    assert [trial.loaded.recipe.training.max_steps for trial in trials] == [2, 3]


def test_names_of_other_tools_are_keys(tmp_path: Path) -> None:
    trials = load_sweep(write(tmp_path), ["lora_r=4,8"]).trials
    assert [trial.loaded.recipe.adapter.model_dump()["r"] for trial in trials] == [4, 8]


def test_one_value_on_the_command_line_is_used_by_all_trials(tmp_path: Path) -> None:
    """Also inside a section that differs between the trials, and in place of the file's values."""
    inside = load_sweep(write(tmp_path), ["adapter=lora,dora", "adapter.r=32"]).trials
    assert [trial.loaded.recipe.adapter.model_dump()["r"] for trial in inside] == [32, 32]
    path = write(tmp_path, "sweep: {keys: {training.learning_rate: [1e-4, 2e-4], adapter.r: [4, 8]}}\n")
    trials = load_sweep(path, ["training.learning_rate=5e-4"]).trials
    assert [trial.name for trial in trials] == ["r=4", "r=8"]
    assert {trial.loaded.recipe.training.learning_rate for trial in trials} == {5e-4}


def test_settings_that_an_evaluation_ignores_are_compared_by_the_loss(tmp_path: Path) -> None:
    trials = load_sweep(write(tmp_path), ["objective=classify", "objective.class_weights=null,balanced"]).trials
    assert len(trials) == 2


def test_random_draws_some_combinations_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path, "sweep: {strategy: random, trials: 4}\n")
    keys = ["adapter.r=1,2,4,8", "training.learning_rate=1e-4,2e-4,4e-4,8e-4"]
    names = [trial.name for trial in load_sweep(path, keys).trials]
    assert len(set(names)) == 4
    assert names == [trial.name for trial in load_sweep(path, keys).trials]
    assert names != [trial.name for trial in load_sweep(path, [*keys, "training.seed=6"]).trials]
    assert len(load_sweep(path, [*keys, "sweep.trials=99"]).trials) == 16


def test_seeds_begin_at_the_seed_of_the_recipe(tmp_path: Path) -> None:
    trials = load_sweep(write(tmp_path, "sweep: {seeds: 3}\n"), ["adapter.r=4,8"]).trials
    assert [trial.loaded.recipe.training.seed for trial in trials] == [5, 6, 7] * 2
    assert [trial.setting for trial in trials] == ["r=4"] * 3 + ["r=8"] * 3
    assert [trial.name for trial in load_sweep(write(tmp_path), ["sweep.seeds=2"]).trials] == ["seed=5", "seed=6"]


def test_each_source_is_left_out_once(tmp_path: Path) -> None:
    sources = "data.train=[a.jsonl, {path: sub/b.jsonl, weight: 2}, c.jsonl]"
    sweep = "sweep: {leave_out: source, keys: {adapter.r: [4, 8]}, seeds: 2}\n"
    path = write(tmp_path, sweep)
    trials = load_sweep(path, [sources, "data.eval=eval.jsonl"]).trials
    assert len(trials) == 2 * 4 * 2
    assert trials[0].name == "r=4,without=nothing,seed=5"
    assert trials[4].setting == "r=4,without=sub-b.jsonl"
    assert trials[4].values == {"adapter.r": 4, "without": "sub/b.jsonl", "training.seed": 5}
    for trial in trials:
        names = [Path(source.path).name for source in trial.loaded.recipe.data.train]
        assert names == [name for name in ("a.jsonl", "b.jsonl", "c.jsonl") if not trial.setting.endswith(name)]
    lines = problems(path)
    assert "sweep.leave_out: data.train has only one source" in lines[0]
    assert any("name evaluation sources" in line for line in lines)
    both = problems(path, sources, "data.eval=eval.jsonl", "data.train.0.weight=1,2")
    assert any("sweep.keys changes data.train too" in line for line in both)


def test_each_fold_is_left_out_once(tmp_path: Path) -> None:
    sources = "data.train=[a.csv, {path: b.jsonl, weight: 2, columns: {q: text}, format: text, max_rows: 9}]"
    path = write(tmp_path, "sweep: {folds: 3, keys: {adapter.r: [4, 8]}, seeds: 2}\n")
    sweep = load_sweep(path, [sources])
    assert [trial.name for trial in sweep.trials][:4] == [
        *(f"r=4,seed=5,fold={fold}" for fold in (1, 2, 3)),
        "r=4,seed=6,fold=1",
    ]
    assert {trial.setting for trial in sweep.trials} == {"r=4", "r=8"}
    trial = sweep.trials[7]
    assert trial.values == {"adapter.r": 8, "training.seed": 5, "fold": 2}
    data, folder = trial.loaded.recipe.data, str(tmp_path / "runs/x")
    files = [fold_file(folder, source, fold) for source, fold in ((0, 1), (0, 3), (1, 1), (1, 3))]
    assert [source.path for source in data.train] == files
    assert [source.weight for source in data.train] == [1, 1, 2, 2]
    assert [source.format for source in data.train] == ["auto", "auto", "text", "text"]
    assert isinstance(data.eval, tuple)
    assert [source.path for source in data.eval] == [fold_file(folder, source, 2) for source in (0, 1)]
    assert all(source.weight == 1 and source.max_rows is None and not source.columns for source in data.eval)
    best = sweep.settings["r=8"].loaded.recipe
    assert best == load_recipe(path, [sources, "adapter.r=8", f"output.dir={folder}/best"]).recipe
    one = load_sweep(write(tmp_path), ["sweep.folds=2", "~data.eval"]).trials
    assert [trial.name for trial in one] == ["fold=1", "fold=2"]


def test_all_faults_of_the_section_are_shown_together(tmp_path: Path) -> None:
    path = write(tmp_path, "sweep:\n  strategy: best\n  keys:\n    adapter.rr: [4]\n    adapter.r: [8, x]\n")
    lines = problems(path)
    assert [line.partition(";")[0].partition(": ")[2].partition(":")[0] for line in lines] == [
        "sweep.strategy",
        "adapter.rr",
        "adapter.r",
    ]


@pytest.mark.parametrize(
    "rest", ["output: 5", "output: []", "model: 3", "data: x", "training: [1]", "adapter: {r: 8, q: 1}"]
)
def test_a_wrong_section_beside_wrong_keys(rest: str, tmp_path: Path) -> None:
    """The faults of both are shown, whatever the other section is."""
    name = rest.partition(":")[0]
    lines = [line for line in RECIPE.splitlines() if not line.startswith(f"{name}:")]
    text = "\n".join([*lines, rest, "sweep: {strategy: best, keys: {adapter.rr: [4], 3: [1], adapter.r: [x]}}"])
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    shown = "\n".join(problems(str(tmp_path / "recipe.yaml")))
    assert "sweep.strategy" in shown
    assert f": {name}" in shown


def test_long_and_equal_names_become_different_folders(tmp_path: Path) -> None:
    keys = '{evaluation.content_free_prompt: ["a {}", "a  {}"], evaluation.choices: [[x, y]]}'
    names = [trial.name for trial in load_sweep(write(tmp_path, f"sweep: {{keys: {keys}}}\n")).trials]
    assert len(set(names)) == 2
    long = load_sweep(write(tmp_path), [f"model.revision={'a' * 60},{'b' * 60}"]).trials
    assert max(len(trial.name) for trial in long) < 60


def test_other_commands_leave_the_section_out(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, "sweep: {keys: {adapter.r: [4, 8]}}\n"))
    plain = load_recipe(write(tmp_path))
    assert loaded.recipe == plain.recipe
    assert "sweep" not in loaded.recipe.model_dump()
    assert any("only `tunekit sweep`" in note for note in loaded.defaults)
    assert load_recipe(write(tmp_path, "sweep: null\n")).recipe == plain.recipe


@pytest.mark.parametrize(
    ("sweep", "overrides", "expected"),
    [
        ("", [], ": there is nothing to sweep"),
        ("sweep: {keys: {adapter.r: [4, x]}}", [], ":5: adapter.r: must be a whole number"),
        ("sweep:\n  keys:\n    adapter.rr: [4]", [], ":7: adapter.rr: unknown key"),
        ("sweep: {keys: {adapter.r: 4}}", [], ":5: sweep.keys.adapter.r: must be a list"),
        ("sweep: {keys: {adapter.r: []}}", [], ":5: sweep.keys.adapter.r: has no values"),
        ("sweep: {keys: {adapter.r: [4, 4]}}", [], ":5: sweep.keys.adapter.r: 4 is listed twice"),
        ("sweep: {keys: {output.dir: [a, b]}}", [], ":5: sweep.keys.output.dir: cannot differ between the trials"),
        ("sweep: {keys: {training.seed: [1, 2]}, seeds: 2}", [], ":5: sweep.seeds: sweep.keys has training.seed too"),
        ("sweep: {keys: {adapter.r: [4]}, strategy: random}", [], ":5: sweep.strategy: random needs the number"),
        ("sweep: {keys: {adapter.r: [4]}, trials: 2}", [], ":5: sweep.trials: has an effect only with"),
        ("sweep: {keys: {adapter.r: [4]}, by: eval.bleu}", [], ":5: sweep.by: bleu is not in evaluation.metrics"),
        ("sweep: {keys: {training.max_steps: [4]}}", [], ":5: training.max_steps: excludes training.epochs"),
        (
            "sweep: {keys: {adapter.r: [4]}, seeds: 2000}",
            [],
            ": sweep: 2,000 trials are more than the maximum of 1,000",
        ),
        ("sweep: {folds: 1}", [], ":5: sweep.folds: must be at least 2"),
        ("sweep: {fold_group: speaker}", [], ":5: sweep.fold_group: there are no folds"),
        (
            "sweep: {folds: 2, leave_out: source}",
            [],
            ":5: sweep.folds: sweep.leave_out already selects the rows by source",
        ),
        ("sweep: {folds: 2, keys: {data.eval: [0.1, 0.2]}}", [], ":5: sweep.folds: sweep.keys changes the rows too"),
        ("sweep: {folds: 2}", ["data.train.0.streaming=true"], ":5: sweep.folds: streamed rows cannot be divided"),
        ("sweep: {keys: {objective: [sft, {method: dpo}]}}", [], ":5: sweep.by: the loss depends on objective,"),
        ("", ["objective.method=dpo,orpo"], "command line: sweep.by: the loss depends on objective.method"),
        ("", ["objective=dpo", "objective.beta=0.1,0.5"], "command line: sweep.by: the loss depends on objective.beta"),
        ("sweep: {strategy: best}", [], ":5: sweep.strategy: must be"),
        (
            "sweep:\n  keys: {adapter.r: [4, 8]}\n  joined: auto",
            [],
            ":7: sweep.joined: was removed: joined trials were slower than separate steps; remove the key",
        ),
        ("", ["adapter.r=4,8", "sweep.joined=false"], "command line: sweep.joined: was removed"),
        ("", ["adapter.r=4,x"], "command line: adapter.r: must be a whole number"),
        ("", ["adapter.r=4,8", "~data.eval"], "command line: sweep.by: trials are compared on evaluation rows"),
        ("", ["adapter.r=4,8", "lora_r=2,3"], "command line: adapter.r: is given twice"),
        ("", ["adapter.r=4,8", "adapter.r=2"], "command line: adapter.r: has values already"),
        ("", ["adapter.r=2", "adapter.r=4,8"], "command line: adapter.r: has values already"),
        ("", ["adapter.r=4,8", "adapter.r=2,3"], "command line: adapter.r: has values already"),
        ("sweep: {folds: 2, keys: {data: [{train: a.jsonl}, {train: b.jsonl}]}}", [], ":5: sweep.folds: sweep.keys"),
        ("sweep: {keys: {data.eval: [null, 0.1]}}", [], ": data.eval: eval=null has no evaluation rows"),
    ],
)
def test_a_problem_has_its_place(sweep: str, overrides: list[str], expected: str, tmp_path: Path) -> None:
    lines = problems(write(tmp_path, sweep + "\n"), *overrides)
    assert any(line.startswith(expected) for line in lines), lines


def test_a_removed_key_is_refused_by_every_command(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r":5: sweep\.joined: was removed: .*; remove the key$"):
        load_recipe(write(tmp_path, "sweep: {joined: true}\n"))


def test_the_problems_of_all_trials_are_shown(tmp_path: Path) -> None:
    lines = problems(write(tmp_path), "adapter.r=x,y,4", "training.learning_rate=1e-4,z")
    assert len(lines) == 3


def test_leave_out_refuses_other_data(tmp_path: Path) -> None:
    """The source that a trial leaves out is the one that its name states."""
    path = write(tmp_path, "sweep: {leave_out: source, keys: {data: [{train: [a.jsonl, b.jsonl], eval: c.jsonl}]}}\n")
    lines = problems(path, "data.train=[a.jsonl, b.jsonl]", "data.eval=c.jsonl")
    assert lines == [":5: sweep.leave_out: sweep.keys changes data.train too; remove one of them"]


def test_the_only_setting_has_a_name(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, "sweep: {seeds: 2, folds: 2}\n"))
    assert [trial.name for trial in sweep.trials] == [f"seed={s},fold={f}" for s in (5, 6) for f in (1, 2)]
    assert list(sweep.settings) == ["the recipe"]
