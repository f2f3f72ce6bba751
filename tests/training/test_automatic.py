"""The values of `sweep --auto`: as many as fit the time, the recipe's own among them; and the time of halving."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.data_case import write_lines
from tests.support.train_case import write_recipe
from tunekit import sweep
from tunekit.errors import RecipeError, RunFolderError
from tunekit.evaluation.evaluator import Evaluator, Queries
from tunekit.files.durable import write_json
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.trial_recipes import Automatic, load_sweep
from tunekit.recipe.recipe import Recipe
from tunekit.records import Plan, PlannedRows, RowCounts, Target
from tunekit.training.automatic import choice_record, choose_values, earlier_choice, most_that_fit
from tunekit.training.halving import halving_seconds
from tunekit.training.rungs import Limits, earlier_rungs, most_settings
from tunekit.training.timing import Costs

RECIPE = """\
model: org/base
data: {train: rows.jsonl, eval: 0.2}
training: {learning_rate: 2e-4, epochs: 3, eval_steps: 6}
output: {dir: run}
"""
COSTS = Costs(
    load=2.0, prepare=1.0, token=0.01, evaluation=3.0, first_evaluation=3.0
)  # a step of 100 tokens takes a second


def plan_of(recipe: Recipe, steps: int, side: int = 64) -> Plan:
    """A plan with 100 tokens in each of `steps` steps, and one adapted matrix."""
    counts = RowCounts(10, 10, 0, 0, 100 * steps // 3, 100 * steps // 3, 50)
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(Plan)), None)
    rows = PlannedRows(counts, counts, False, "", None, steps // 3)
    values |= {"steps": steps, "rows": rows, "supervised_tokens": 100 * steps}
    values["targets"] = [Target("layer", "linear", 1000, side, 0, 16)]
    return Plan(**values)


def recipe_at(folder: Path, *overrides: str) -> tuple[str, Recipe]:
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    path = str(folder / "recipe.yaml")
    return path, load_recipe(path, overrides).recipe


def test_the_cost_of_a_run(tmp_path: Path) -> None:
    _, recipe = recipe_at(tmp_path)
    plan = plan_of(recipe, 60)
    assert COSTS.of_run(plan, recipe) == pytest.approx(1 + 60 + 11 * 3)
    assert COSTS.of_parts(plan, recipe, [12, 30]) == pytest.approx([1 + 12 + 3 * 3, 1 + 18 + 3 * 3, 1 + 30 + 5 * 3])
    assert COSTS.of_parts(plan, recipe, [60, 60]) == pytest.approx([1 + 60 + 33, 0, 0])
    never = recipe.model_copy(update={"training": recipe.training.model_copy(update={"eval_steps": 1000})})
    assert COSTS.of_run(plan, never) == pytest.approx(1 + 60 + 2 * 3)
    assert replace(COSTS, first_evaluation=9.0).of_run(plan, never) == pytest.approx(1 + 60 + 9 + 3)


def test_halving_continues_the_longest_in_the_worst_case() -> None:
    assert halving_seconds({"a": [1, 1, 2], "b": [2, 2, 4], "c": [1, 1, 2]}) == 4 + (2 + 1) + 4
    assert halving_seconds({}) == 0
    parts = {"a": [10.0, 10.0], "b": [1.0, 1.0], "c": [5.0, 5.0], "d": [1.0, 1.0]}
    assert most_that_fit("abcd", parts, 100) == 2
    assert most_that_fit("abcd", parts, 20.5) == 1
    assert most_that_fit("bacd", parts, 21) == 2
    assert most_that_fit("abcd", parts, -5) == 1


def test_the_time_decides_how_much_is_tried(tmp_path: Path) -> None:
    path, recipe = recipe_at(tmp_path)
    plan, before = plan_of(recipe, 60), 0
    for seconds in (300, 600, 1200, 2400, 6000):
        choice = choose_values(recipe, plan, COSTS, seconds)
        assert choice is not None
        assert choice.seconds <= 0.8 * seconds
        automatic = choice.automatic
        assert len(automatic.keys["training.epochs"]) >= before
        before = len(automatic.keys["training.epochs"])
        assert 2e-4 in automatic.keys["training.learning_rate"]
        assert automatic.keys["training.epochs"][0] == 3
        sweep = load_sweep(path, (), automatic)
        assert len(sweep.trials) == choice.trials
        assert sweep.section.strategy == "halving"
        for trial in sweep.trials:
            training = trial.loaded.recipe.training
            assert training.eval_steps == automatic.eval_steps[training.epochs or 0]
            assert "eval_steps" not in trial.name
    assert choice.trials == 24
    assert choice.automatic.keys == {
        "training.epochs": [3, 9, 27],
        "training.learning_rate": [6.7e-5, 2e-4, 6e-4, 2e-3],
        "adapter.r": [16, 64],
    }
    assert choose_values(recipe, plan, COSTS, 30) is None


def test_if_two_whole_runs_do_not_fit_all_trials_have_a_third_of_the_length(tmp_path: Path) -> None:
    """A run of 60 steps takes at least 94 s, so --minutes 2 cannot hold two of them."""
    path, recipe = recipe_at(tmp_path)
    choice = choose_values(recipe, plan_of(recipe, 60), COSTS, 120)
    assert choice is not None
    assert choice.shortened
    assert choice.automatic.keys["training.epochs"] == [1]
    assert choice.seconds <= 0.8 * 120
    assert {trial.loaded.recipe.training.epochs for trial in load_sweep(path, (), choice.automatic).trials} == {1}
    for one, length, third in (("training.epochs", 1, 0.33), ("training.max_steps", 2, 1)):
        others = ["~training.epochs"] if one != "training.epochs" else []
        _, recipe = recipe_at(tmp_path, f"{one}={length}", *others)
        choice = choose_values(recipe, plan_of(recipe, 60), COSTS, 120)
        assert choice is not None
        assert choice.automatic.keys[one] == [third]


def test_the_recipes_own_values_are_not_rounded(tmp_path: Path) -> None:
    _, recipe = recipe_at(tmp_path, "training.learning_rate=1.25e-4", "training.epochs=0.125")
    choice = choose_values(recipe, plan_of(recipe, 60), COSTS, 1e6)
    assert choice is not None
    assert 1.25e-4 in choice.automatic.keys["training.learning_rate"]
    assert 0.125 in choice.automatic.keys["training.epochs"]


def test_each_seed_takes_its_time(tmp_path: Path) -> None:
    path, recipe = recipe_at(tmp_path)
    one, three = (choose_values(recipe, plan_of(recipe, 60), COSTS, 1e6, seeds) for seeds in (1, 3))
    assert one is not None
    assert three is not None
    assert three.seconds == pytest.approx(3 * one.seconds)
    assert three.trials == len(load_sweep(path, ["sweep.seeds=3"], three.automatic).trials)


def test_without_a_rank_and_with_steps(tmp_path: Path) -> None:
    _, recipe = recipe_at(tmp_path, "adapter=ia3", "training.max_steps=60", "~training.epochs")
    choice = choose_values(recipe, plan_of(recipe, 60), COSTS, 1e6)
    assert choice is not None
    assert list(choice.automatic.keys) == ["training.max_steps", "training.learning_rate"]
    assert choice.automatic.eval_steps == {60: 8, 180: 23, 540: 68}


def test_a_rank_that_no_matrix_can_have_is_not_tried(tmp_path: Path) -> None:
    _, recipe = recipe_at(tmp_path)
    choice = choose_values(recipe, plan_of(recipe, 60, side=63), COSTS, 1e6)
    assert choice is not None
    assert "adapter.r" not in choice.automatic.keys


def trials_of(recipe: Recipe, steps: int, *settings: str) -> Any:
    rows = SimpleNamespace(objective=SimpleNamespace(loss=SimpleNamespace(updates_per_sampling=1)))
    return [
        SimpleNamespace(
            plan=plan_of(recipe, steps),
            steps=steps,
            planned=SimpleNamespace(rows=rows),
            error=None,
            recipe=SimpleNamespace(setting=setting, loaded=SimpleNamespace(recipe=recipe)),
        )
        for setting in settings
    ]


def test_the_measured_time_of_a_comparison_corrects_the_next_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that take twice their predicted time leave time for fewer of them."""
    _, recipe = recipe_at(tmp_path)
    trials, results = trials_of(recipe, 48, *"abcd"), SimpleNamespace(settings=[])
    results.settings = [SimpleNamespace(name=name, numbers=[1.0]) for name in "abcd"]
    monkeypatch.setattr("tunekit.training.rungs.time.monotonic", lambda: 0.0)
    # the second comparison is at step 24, after 1 + 12 + 2 * 3 predicted seconds for each of two trials; then one of
    # them has 1 + 24 + 4 * 3 seconds
    limits = Limits(2 * 19 + 37, COSTS)
    assert most_settings(limits, results, trials, 2) == 2
    limits.set_pace(4 * 22 * 1.02, trials, 2, first=True)  # step 12: 1 + 12 + 3 * 3 for each of four trials
    assert limits.pace == pytest.approx(1.02)
    assert most_settings(limits, results, trials, 2) == 1
    limits.set_pace(2 * 19 * 3.0, trials[:2], 1, first=False)
    assert limits.pace == pytest.approx(3)
    limits.set_pace(1.0, [], 1, first=False)
    assert limits.pace == pytest.approx(3)


def test_the_predicted_seconds_of_a_setting_include_all_its_seeds(tmp_path: Path) -> None:
    _, recipe = recipe_at(tmp_path)
    one, two = (Limits(0.0, COSTS).parts(trials_of(recipe, 48, *names), 2) for names in ("a", "aa"))
    assert one == {"a": pytest.approx([22, 19, 37])}
    assert two == {"a": pytest.approx([44, 38, 74])}


def test_an_evaluation_costs_its_answers_and_questions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of each is measured, and the seconds are scaled to all of them."""
    clock = [0.0]
    monkeypatch.setattr("tunekit.evaluation.evaluator.time.monotonic", lambda: clock[0])

    def takes(seconds: float) -> Any:
        def work(evaluator: Evaluator, *queries: list[Any]) -> list[str]:
            clock[0] += seconds * len(queries[-1]) if queries else seconds
            return ["12345678"] * len(queries[-1]) if queries else []

        return work

    monkeypatch.setattr(Evaluator, "_answers", takes(2.0))
    monkeypatch.setattr(Evaluator, "_chosen", takes(0.5))
    monkeypatch.setattr(Evaluator, "_pictures", takes(7.0))
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(Evaluator)), None)
    for prompts, questions, seconds in ((0, 0, 7), (100, 0, 207), (3, 50, 38), (4, 4, 17)):
        choices: Any = "choices" if questions else None
        asked: Any = [SimpleNamespace(reference="12")] * prompts
        queries = Queries(asked, choices, list(range(questions)))  # type: ignore[arg-type]
        few = Evaluator(**(values | {"queries": queries, "settings": SimpleNamespace(batch_size=4)}))
        before = clock[0]
        # a trained model answers with 2 of 8 characters
        assert few.query_seconds() == pytest.approx((seconds, seconds - prompts * 2 * 3 / 4))
        assert clock[0] - before <= 7 + 4 * 2.5


DAMAGED = (
    "{}",
    "[]",
    "7",
    '{"rungs": [["a"]]}',
    '{"settings": ["a", "b"], "rungs": 3}',
    '{"settings": [], "rungs": [3]}',
)


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_comparisons_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "rungs.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"rungs\.json is damaged; choose another output\.dir"):
        earlier_rungs(tmp_path, [])
    assert earlier_rungs(tmp_path / "absent", []) == []


@pytest.mark.parametrize(
    "text", [*DAMAGED, '{"keys": {"a": 1}}', '{"keys": {"a": [1]}, "length": "b", "eval_steps": []}']
)
def test_damaged_values_of_an_earlier_choice_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "auto.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"auto\.json is damaged; choose another output\.dir"):
        earlier_choice(tmp_path)


def test_a_resume_reads_the_chosen_values(tmp_path: Path) -> None:
    keys: dict[str, list[object]] = {"training.max_steps": [3, 9], "training.learning_rate": [0.1], "adapter.r": [16]}
    automatic = Automatic(keys, "training.max_steps", {3.0: 6, 9.0: 17})
    assert earlier_choice(tmp_path) is None
    write_json(tmp_path / "auto.json", choice_record(automatic))
    earlier = earlier_choice(tmp_path)
    assert earlier == automatic
    assert list(earlier.keys) == list(keys)  # otherwise the trials have other names


def test_a_resumed_sweep_of_kto_may_have_one_row_per_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version could begin it. A new one is refused, because its rows have no other row to compare with."""
    sizes = {"micro_batch_size": 1, "gradient_accumulation_steps": 1}
    recipe = write_recipe(tmp_path, tiny_llama, objective={"method": "kto"}, training=sizes)
    rows = [{"prompt": f"p{number}", "completion": "c", "label": number % 2 == 0} for number in range(20)]
    write_lines(tmp_path / "train.jsonl", rows)

    def measured(*values: object) -> None:
        raise KeyError("measured")

    monkeypatch.setattr(sweep, "measure_costs", measured)
    loaded = load_recipe(recipe)
    with pytest.raises(RecipeError, match="a step has one row"):
        sweep.automatic_verb(loaded, str(recipe), [], 60.0, False, None)
    with pytest.raises(KeyError, match="measured"):
        sweep.automatic_verb(loaded, str(recipe), [], 60.0, True, None)
