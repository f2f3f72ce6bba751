"""Each rule speaks on facts that call for it, and is silent on facts that differ in one point."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts.test_report import make_plan
from tests.support.run_case import write_run
from tests.support.train_case import write_recipe
from tunekit.artifacts.report.next_step import (
    AFTER_TRAINING,
    AFTER_VERDICT,
    after_data_check,
    after_evaluation,
    after_plan,
    after_training,
    evaluation_falls,
    evaluation_rises,
    learned_at_once,
    loss_is_flat,
    memory_is_left,
    nothing_measured,
    rows_are_few,
)
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.values import RunValues, Values
from tunekit.basics import student
from tunekit.console import Console
from tunekit.console.loudness import LOUDNESS
from tunekit.evaluate import evaluate_verb

REGRESSION = {"objective": {"method": "classify", "problem_type": "regression"}}
NAMES = [f"row {at}" for at in range(16)]
FALLING = [2.0 - 0.04 * step for step in range(30)]


def make_run(
    losses: list[float] = FALLING,
    evaluations: dict[int, float] | None = None,
    *,
    norm: float = 0.5,
    accuracy: dict[int, float] | None = None,
    recipe: dict[str, Any] | None = None,
    rows: dict[str, list[Any]] | None = None,
    **plan: Any,
) -> RunValues:
    """A finished run of these losses; `evaluations`: loss by step."""
    steps = [Values(step=at + 1, loss=loss, grad_norm=norm) for at, loss in enumerate(losses)]
    measured = {2: 2.0, 30: 1.0} if evaluations is None else evaluations
    records = [
        Values(step=step, eval={"loss": loss, **({"accuracy": accuracy[step]} if accuracy else {})})
        for step, loss in measured.items()
    ]
    training = {"learning_rate": 3e-4, "epochs": 3, "max_grad_norm": 1.0}
    facts = {"recipe": {"training": training, **(recipe or {})}, "rows": {"steps_per_epoch": 10}, "device": "cpu"}
    report = Values(measured_bytes={"cuda": 4 << 30})
    run = RunValues(Path("runs/first"), "", Values(facts | plan), report, Values(), Values(), steps, records)
    digests = [f"row {at}" for at in range(len((rows or {}).get("losses", [])))]
    run.__dict__["row_losses"] = Values({"digests": digests, **rows} if rows else {})
    return run


def test_the_evaluation_loss_rises() -> None:
    up = {0: 3.0, 10: 2.0, 20: 1.5, 30: 1.9}
    text = evaluation_rises(make_run(evaluations=up))
    assert text is not None
    assert "risen since step 20 (1.5 to 1.9)" in text
    assert "to export step 20, set evaluation.best: eval.loss; to end a run there, set training.epochs: 2" in text
    chosen = evaluation_rises(make_run(evaluations=up, recipe={"evaluation": {"best": "eval.loss"}}))
    assert chosen is not None
    assert "to export" not in chosen
    for key, length, end in (("epochs", 3, "training.epochs: 2"), ("max_steps", 30, "training.max_steps: 20")):
        settings = {"evaluation": {"best": "eval.loss", "patience": 1}, "training": {key: length}}
        assert (evaluation_rises(make_run(evaluations=up, recipe=settings)) or "").endswith(
            f"to end a run there, set {end}"
        )
    other = {"evaluation": {"best": "eval.accuracy"}}
    assert evaluation_rises(make_run(evaluations=up, recipe=other)) is None  # the exported step has the best accuracy
    assert evaluation_rises(make_run(FALLING[::-1], evaluations=up)) is None  # the training loss rises too
    assert evaluation_rises(make_run(evaluations=up | {30: 1.51})) is None  # by less than 1 %
    assert evaluation_rises(make_run(evaluations={0: 1.0, 10: 2.0, 30: 3.0})) is None  # never below the start
    flat = [2.0 + 0.1 * math.sin(7.0 * step) - 0.0003 * step for step in range(30)]
    assert [text[:26] for text in after_training(make_run(flat, up))] == ["the training loss is flat "]
    long = make_run([2.0 - 0.001 * step for step in range(2000)], {0: 3.0, 1495: 1.5, 1800: 1.7, 2000: 1.9})
    assert (evaluation_rises(long) or "").endswith("set training.epochs: 149.5")  # was 1.5e+02


def test_the_evaluation_loss_still_falls() -> None:
    down = {0: 3.0, 10: 2.0, 20: 1.5, 30: 1.4}
    text = evaluation_falls(make_run(evaluations=down))
    assert text == (
        "the evaluation loss still falls (1.5 to 1.4 in the last 10 steps): train longer, for example with "
        "training.epochs: 6"
    )
    by_steps = evaluation_falls(make_run(evaluations=down, recipe={"training": {"max_steps": 30}}))
    assert by_steps is not None
    assert by_steps.endswith("training.max_steps: 60")
    many = evaluation_falls(make_run(evaluations=down, recipe={"training": {"max_steps": 650_001}}))
    assert (many or "").endswith("training.max_steps: 1300002")  # was 1.3e+06
    for best, advice in ((10, False), (30, True)):  # the step with the best accuracy
        judged = make_run(evaluations=down, recipe={"evaluation": {"best": "eval.accuracy"}})
        judged.report["best_step"] = best
        assert (evaluation_falls(judged) is not None) == advice
    early = make_run(evaluations=down, steps=60)
    early.report["final_step"] = 30
    assert evaluation_falls(early) is None  # the watched metric stopped the run
    assert evaluation_falls(make_run(evaluations=down | {30: 1.49})) is None  # by less than 1 %
    assert evaluation_falls(make_run(evaluations={0: 0.03, 10: 0.02, 30: 0.001})) is None  # nothing is left to learn
    for objective in (REGRESSION, {"objective": {"method": "dreambooth"}}):
        assert evaluation_falls(make_run(evaluations={0: 0.03, 10: 0.02, 30: 0.001}, recipe=objective)) is not None
    assert evaluation_falls(make_run(evaluations={0: 3.0, 30: 1.0})) is None  # two points are no trend


def test_the_training_loss_is_flat() -> None:
    flat = [2.0 + 0.1 * math.sin(7.0 * step) for step in range(30)]
    text = loss_is_flat(make_run(flat))
    assert text is not None
    assert text.endswith("training.learning_rate=0.0009,0.0001")
    clipped = loss_is_flat(make_run(flat, norm=1.5))
    assert clipped is not None
    assert "clipped in 100% of the steps" in clipped
    assert clipped.endswith("training.learning_rate=0.0001,0.0009")
    assert loss_is_flat(make_run()) is None
    assert loss_is_flat(make_run(flat[:8])) is None  # too few steps
    assert loss_is_flat(make_run([loss / 1000 for loss in flat])) is None  # nothing is left to learn
    assert loss_is_flat(make_run([loss / 1000 for loss in flat], recipe=REGRESSION)) is not None


def test_nothing_was_left_to_learn() -> None:
    text = learned_at_once(make_run([0.003, 0.002]))
    assert text is not None
    assert "0.003 already at step 1" in text
    assert learned_at_once(make_run()) is None
    methods = [{"objective": {"method": method}} for method in ("distill", "dreambooth")]
    for objective in (*methods, REGRESSION):  # the loss is no log-probability
        assert learned_at_once(make_run([0.003, 0.002], recipe=objective)) is None
    evaluations = {2: 2.0, 30: 1.0}
    leaked = learned_at_once(make_run(evaluations=evaluations, accuracy={2: 1.0, 30: 1.0}))
    assert leaked is not None
    assert "at step 2: check with tunekit data check" in leaked
    before = learned_at_once(make_run(evaluations={0: 2.0} | evaluations, accuracy={0: 1.0, 2: 1.0, 30: 1.0}))
    assert before is not None  # training rows cannot be the reason
    assert before.endswith("at step 0: check with tunekit preview that the prompt does not contain the answer")
    assert learned_at_once(make_run(evaluations=evaluations, accuracy={2: 0.9, 30: 1.0})) is None


def test_the_noise_of_few_rows_is_that_of_their_interval() -> None:
    """Losses of 1 and 3, one token each: the standard error of 16 rows is sqrt(16 / 15) / 4."""
    columns = {"losses": [1.0, 3.0] * 8, "units": [1.0] * 16, "before": [3.0] * 16}
    text = rows_are_few(make_run(rows=columns))
    assert text is not None
    reach = student(15) * math.sqrt(16 / 15) / 4
    assert text.startswith(f"with 16 different evaluation rows, the loss is uncertain by ± {reach:.2g}; ")
    copies = rows_are_few(
        make_run(rows={name: values * 9 for name, values in columns.items()} | {"digests": NAMES * 9})
    )
    assert copies == text  # copies of a row do not make the loss more certain
    one = rows_are_few(make_run(rows=columns | {"digests": ["the same row"] * 16}))
    assert one == "one evaluation row does not show how uncertain the loss is: evaluate more rows"
    assert rows_are_few(make_run(rows=columns | {"digests": NAMES[:5]})) is None  # a damaged record
    same = {**columns, "losses": [2.0 * units for units in range(1, 17)], "units": [float(at) for at in range(1, 17)]}
    assert rows_are_few(make_run(rows=same)) is None  # each row has the same mean loss
    assert rows_are_few(make_run(rows=columns | {"before": [9.0] * 16})) is None  # training changed the loss much more


def test_memory_for_twice_the_micro_batch() -> None:
    facts: dict[str, Any] = {"choice": {"micro_batch_size": 2, "gradient_accumulation_steps": 8}, "device": "cuda"}
    facts |= {"peak_bytes": {"activations": 2 << 30, "logits": 1 << 30}, "budget_bytes": 8 << 30}
    text = memory_is_left(make_run(**facts))
    assert text is not None
    assert text.startswith(
        "4.0 GiB of the budget was free: to make the same steps faster, set training.micro_batch_size: 4 and "
    )
    assert "training.gradient_accumulation_steps: 4" in text
    odd = {"choice": {"micro_batch_size": 2, "gradient_accumulation_steps": 3}}
    for change in (odd, {"device": "cpu"}, {"budget_bytes": 6 << 30}, {"budget_bytes": None}):
        assert memory_is_left(make_run(**facts | change)) is None


@pytest.mark.parametrize(
    ("objective", "rows", "advice"),
    [
        ("sft", {"trained": 2}, "set data.eval: 0.1 "),
        ("sft", {"trained": 1}, "name a file in data.eval, "),
        ("sft", {"trained": 500, "estimated": True}, "name a file in data.eval, "),
        ("dreambooth", {"trained": 5}, "set data.eval to the path of data.train, "),
    ],
)
def test_the_advised_evaluation_rows_are_possible(objective: str, rows: dict[str, int], advice: str) -> None:
    """No share of one row or of a stream can be held out; five images of a subject are all needed for training."""
    method = {"objective": {"method": objective}}
    run = make_run(evaluations={}, recipe=method)
    run.plan["rows"] = {"training": rows}
    assert (nothing_measured(run) or "").startswith(f"no evaluation rows measure the result: {advice}")
    plan = make_plan()
    counts = replace(plan.rows.training, **rows)
    plan = replace(plan, recipe={**plan.recipe, **method}, rows=replace(plan.rows, training=counts, evaluation=None))
    steps = after_plan(plan, Path("mine.yaml"), overrides=(), device="cpu")
    assert steps == [nothing_measured(run), "tunekit train mine.yaml --device cpu"]


def test_at_most_two_and_the_remedy_after_a_bad_verdict(tmp_path: Path) -> None:
    run = make_run([0.003] * 30, {}, rows={"losses": [1.0, 9.0], "units": [1.0, 1.0]})
    assert sum(rule(run) is not None for rule in AFTER_TRAINING) > 2
    assert len(after_training(run)) == 2
    blind = make_run(evaluations={})
    assert after_training(blind) == [nothing_measured(blind)]
    run.report["verdict"] = "worse than the base"
    assert after_training(run) == [AFTER_VERDICT]
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.001}) + "\n", encoding="utf-8")
    from tunekit.artifacts.report.values import read_run

    assert [section.title for section in run_report(read_run(folder)).sections][1] == "Next step"


def test_after_a_data_check_and_an_evaluation() -> None:
    recipe = Path("my recipe.yaml")
    assert after_data_check([{}], recipe, overrides=["data.max_length=9"], fixes=False) == [
        "tunekit preview 'my recipe.yaml' data.max_length=9 shows what the model is trained on"
    ]
    assert after_data_check([{}, {"near": [3]}], recipe, fixes=False) == [  # of the evaluation rows
        "correct the rows with findings, or remove them"
    ]
    steps = after_data_check([{"near": [3], "long": [4]}, {"leak": [7]}], recipe, fixes=True)
    assert steps[0].startswith("remove training rows that equal evaluation rows")
    assert steps[1].startswith("--fix FILE")
    names, even, units = list(range(50)), np.full(50, 2.0), np.ones(50)
    assert after_evaluation("mine.yaml", "recipe", names, even, units) == [
        "tunekit train mine.yaml, then evaluate its run on the same rows"
    ]
    (changed,) = after_evaluation("mine.yaml", "recipe", names, even, units, changes=["model.dtype=float32"])
    assert changed.startswith("tunekit train mine.yaml model.dtype=float32, then ")
    assert after_evaluation("adapter", "adapter", names, even, units) == []
    assert after_evaluation("adapter", "adapter", [], np.array([]), np.array([])) == []  # no loss was measured
    (noise,) = after_evaluation("adapter", "adapter", names, even + np.arange(50) % 2 * 4, units)
    assert noise.startswith("with 50 different evaluation rows, the loss is uncertain by ± ")


def test_quiet_prints_no_next_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Console().next_steps(["tunekit train mine.yaml"])
    assert capsys.readouterr().out == "next: tunekit train mine.yaml\n"
    monkeypatch.setenv(LOUDNESS, "quiet")
    Console().next_steps(["tunekit train mine.yaml"])
    assert capsys.readouterr().out == ""


def test_an_evaluation_counts_copies_of_a_row_once(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.dumps({"prompt": "a", "completion": "abab"})
    (tmp_path / "eval.jsonl").write_text("\n".join([row] * 4), "utf-8")
    recipe = write_recipe(tmp_path, tiny_llama, data={"eval": "eval.jsonl"})
    evaluate_verb(str(recipe), None, None, None, [], None, [])
    assert "one evaluation row does not show how uncertain the loss is" in " ".join(capsys.readouterr().out.split())
