"""A learning rate that harms: what the run says of it, in its console, report and status; and that looking changes no
bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support.train_case import Ended, records, result_bytes, train_in_child, write_recipe

# At this rate the squares in a norm overflow after two steps, so that its output is 0 and every token equally likely,
# whatever the kernels of the processor round. At 1.0 the loss rises to 14 and falls again: where it is after the last
# step depends on the rounding.
RATE, UNIFORM = 100.0, math.log(512)


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("work"), tiny_llama, training={"epochs": 4.0})


def trained(recipe: Path, name: str, *overrides: str) -> tuple[Path, Ended]:
    ended = train_in_child(recipe, recipe.parent / name, *overrides)
    assert ended.code == 0, ended.output
    return recipe.parent / name, ended


@pytest.mark.drawn
def test_the_evaluation_before_training_changes_no_bit_and_can_be_switched_off(recipe: Path) -> None:
    looked, ended = trained(recipe, "looked")
    blind, _ = trained(recipe, "blind", "evaluation.before_training=false")
    assert result_bytes(looked) == result_bytes(blind)
    first, *rest = records(looked)
    assert first.keys() == {"step", "eval"}
    assert first["step"] == 0
    others = [record for record in records(blind) if "eval" in record]
    assert [record for record in rest if "eval" in record] == others
    report = json.loads((looked / "report.json").read_text())
    assert report["base_eval_loss"] == first["eval"]["loss"] > report["eval_loss"] == others[-1]["eval"]["loss"]
    assert "verdict" not in report
    kept = json.loads((looked / "evaluation_rows.json").read_text())
    assert kept["step"] == 12
    for name, loss in (("before", report["base_eval_loss"]), ("losses", report["eval_loss"])):
        assert sum(kept[name]) / sum(kept["units"]) == pytest.approx(loss, rel=1e-5)
    means = [loss / units for loss, units in zip(kept["losses"], kept["units"], strict=True)]
    worst = [each["number"] for each in kept["worst"]]
    assert [means[number] for number in worst] == sorted(means, reverse=True)[:8]
    assert any(trained for text, trained in kept["worst"][0]["text"] if text)
    assert f">{kept['rows'][worst[0]]}</td>" in (looked / "report.html").read_text()
    losses = [record["loss"] for record in rest if "loss" in record]
    assert len(losses) == 12
    assert report["first_loss"] == pytest.approx(sum(losses[:2]) / 2)
    assert report["final_loss"] == pytest.approx(sum(losses[-2:]) / 2)
    assert "base_eval_loss" not in json.loads((blind / "report.json").read_text())
    assert "worse than" not in ended.output


@pytest.mark.drawn
def test_a_rate_that_is_far_too_high_is_called_that(stories: Path, tmp_path: Path) -> None:
    training = {"epochs": 4.0, "learning_rate": RATE, "scheduler": "constant"}
    recipe = write_recipe(tmp_path / "work", stories, data={"train": [{"path": "rows.jsonl"}]}, training=training)
    rows = [{"text": f"Once upon a time there was a little dog. It had {number} red balls."} for number in range(20)]
    (tmp_path / "work" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run, ended = trained(recipe, "diverged")
    report = json.loads((run / "report.json").read_text())
    assert report["eval_loss"] == pytest.approx(UNIFORM)
    assert report["eval_loss"] > 1.5 * report["base_eval_loss"]
    assert report["verdict"].startswith("the exported weights are worse than the base: eval loss ")
    assert json.loads((run / "status.json").read_text()) == {
        "exit_code": 0,
        "finished": True,
        "reason": f"finished; {report['verdict']}",
    }
    assert f"warning: {report['verdict']}; with evaluation.best" in ended.output
    assert f"the rate {RATE:g} is too high: set training.learning_rate: " in ended.output
    assert "next: " not in ended.output  # the warning has the advice
    assert report["verdict"].capitalize() in (run / "report.md").read_text().replace("\\", "")
    (reaction,) = [each for each in report["reactions"] if "at step 1" in each["probe"]]
    assert "rows.jsonl:" in reaction["action"]
    assert f"warning: step {reaction['step']}: {reaction['probe']}" in ended.output


@pytest.mark.drawn
def test_so_it_is_without_evaluation_rows(stories: Path, tmp_path: Path) -> None:
    data = {"train": [{"path": "rows.jsonl"}], "eval": None}
    recipe = write_recipe(
        tmp_path / "work", stories, data=data, training={"max_steps": 8, "epochs": None, "learning_rate": RATE}
    )
    rows = [{"text": f"Once upon a time there was a little dog. It had {number} red balls."} for number in range(20)]
    (tmp_path / "work" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run, ended = trained(recipe, "diverged")
    report = json.loads((run / "report.json").read_text())
    assert "base_eval_loss" not in report
    assert report["verdict"].startswith("the run ended worse than it began: training loss ")
    assert json.loads((run / "status.json").read_text()) == {
        "exit_code": 0,
        "finished": True,
        "reason": f"finished; {report['verdict']}",
    }
    assert f"warning: {report['verdict']}; with evaluation.best" in ended.output
    assert f"the rate {RATE:g} is too high: set training.learning_rate: " in ended.output
    page = (run / "report.md").read_text().replace("\\", "")
    assert report["verdict"].capitalize() in page
    assert "Training loss did not fall." in page
    assert f"warning: a learning rate of {RATE:g} is very high" in ended.output


def test_a_last_step_that_is_far_worse_than_those_before_is_told_with_what_to_do(
    tiny_llama: Path, tmp_path: Path
) -> None:
    data = {"train": [{"path": "rows.jsonl"}], "eval": None, "shuffle": False}
    training = {"epochs": 1.0, "learning_rate": 0.03, "scheduler": "constant", "save_steps": 20, "keep_checkpoints": 2}
    batches = {"micro_batch_size": 1, "gradient_accumulation_steps": 1}
    adapter = {"modules_to_save": ["lm_head"], "dropout": 0.0}
    recipe = write_recipe(tmp_path / "work", tiny_llama, data=data, training=training | batches, adapter=adapter)
    rows = [{"text": "ab"}] * 29 + [{"text": "The quick brown fox"}]
    (tmp_path / "work" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run, ended = trained(recipe, "spike")
    losses = [record["loss"] for record in records(run)]
    assert losses[-1] > 100 * max(losses[-4:-1])
    report = json.loads((run / "report.json").read_text())
    assert report["verdict"].startswith(f"the run ended on a spike: the loss {losses[-1]:.4g} of the last step is ")
    (reaction,) = report["reactions"]
    assert reaction["step"] == 30
    assert "this was the last step, and its weights are exported; with evaluation.best: eval.loss" in reaction["action"]
    assert "rows.jsonl:30" in reaction["action"]
    (warning,) = [line for line in ended.output.splitlines() if line.startswith(f"warning: {report['verdict']}")]
    assert "with evaluation.best: eval.loss, the best evaluated step" in warning
    assert warning.endswith("spike@20")
    assert report["verdict"].capitalize() in (run / "report.md").read_text().replace("\\", "")
