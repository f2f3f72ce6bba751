"""Reward models: loss, gradient and what is logged against trl's trainer; whole runs against transformers and peft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_trainer import RewardTrainer

from tests.objectives.test_classify import bert, llama  # noqa: F401
from tests.objectives.test_dpo import CPU, check_it_is_one_run, pairs, write_recipe
from tests.objectives.test_dpo import base as base
from tests.support.data_case import objective_of
from tests.support.pair_case import PAIRS, parts_of, trainer_of
from tests.support.plans import make_plan
from tests.support.train_case import losses, records, train
from tunekit.contracts import Batch, ModelOutput, Row
from tunekit.errors import InputError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import answer, generate_verb, score_file
from tunekit.merge import merge_verb
from tunekit.objectives.rows.answers import SIDES
from tunekit.planning.checks import raise_refusals
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.reward import SCORES, RewardSettings
from tunekit.targets.target import find_target, load_target

MARGINS = (0.5, 0.0, 1.25, -0.5, 0.0)


class Given(nn.Module):
    """A sequence classifier that gives these scores, whatever it is asked."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.scores[:, None])


def pair_of(ids: list[Any], prompt: int, margin: float) -> dict[str, Any]:
    """Parts of a chosen and a rejected sequence, which begin with so many tokens of a prompt."""
    sides = [(name, line, np.arange(len(line)) >= prompt) for name, line in zip(SIDES, ids, strict=True)]
    return parts_of(*sides, margin=np.array([margin], np.float32))


def make_rows(objective: Any) -> list[Row]:
    rows = []
    for number, (chosen, rejected, prompt) in enumerate(PAIRS):
        ids = [np.arange(1, prompt + size + 1, dtype=np.int32) for size in (chosen, rejected)]
        rows.append(objective.rows.make_row(pair_of(ids, prompt, MARGINS[number]), f"d:{number}", number))
    return rows


def output_of(batch: Batch, scores: Tensor) -> ModelOutput:
    """Hidden states of one number, which the head hands on: the score wherever one is read."""
    flat = torch.zeros(batch.inputs["input_ids"].numel()).index_put((batch.targets["last"],), scores)
    hidden = flat.view(*batch.inputs["input_ids"].shape, 1)
    return ModelOutput(hidden, SimpleNamespace(logits=lambda states: states))


@pytest.mark.parametrize("coefficient", [None, 0.3])
def test_loss_gradient_and_what_is_logged_are_trls(coefficient: float | None) -> None:
    objective: Any = objective_of(RewardSettings(center_rewards_coefficient=coefficient))
    scores = torch.randn(2, len(PAIRS), generator=torch.Generator().manual_seed(0)).requires_grad_()
    model = Given(scores.flatten())
    trainer = trainer_of(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.accelerator = SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value)
    inputs = {"margin": torch.tensor(MARGINS), "attention_mask": torch.ones(10, 4)}
    expected = RewardTrainer.compute_loss(trainer, model, inputs)
    (gradient,) = torch.autograd.grad(expected, scores)
    theirs = {name: values[0] for name, values in trainer._metrics["train"].items()}
    rows, found, sizes = make_rows(objective), [], (2, 1, 2)
    for size, start in zip(sizes, (0, 2, 3), strict=True):
        batch = objective.rows.collate([[row] for row in rows[start : start + size]])
        found.append(objective.loss.loss(output_of(batch, scores[:, start : start + size].flatten()), batch))
    loss = torch.cat([each.total for each in found]).sum() / len(rows)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], gradient, rtol=1e-5, atol=1e-6)
    logged = {name: sum(float(each.metrics[name]) for each in found) / len(rows) for name in SCORES}
    assert logged["rewards_accuracies"] == pytest.approx(theirs["accuracy"], rel=1e-5)
    assert logged["rewards_margins"] == pytest.approx(theirs["margin"], rel=1e-5)
    both = (logged["rewards_chosen"] + logged["rewards_rejected"]) / 2
    assert both == pytest.approx(theirs["mean_reward"], rel=1e-5)


def test_a_score_is_read_before_the_padding() -> None:
    """As transformers does, also where padding and end of sequence are one token."""
    objective: Any = objective_of(RewardSettings(), pad_id=2)
    ids = [np.array([5, 6, 7, 2], np.int32), np.array([5, 2, 9], np.int32)]
    row = objective.rows.make_row(pair_of(ids, 1, 0.0), "d:1")
    assert objective.rows.collate([[row]]).targets["last"].tolist() == [2, 4 + 2]
    assert objective.laid_out(True).rows.collate([[row]]).inputs["input_ids"].shape == (1, 7)


# Whole runs.


def write_reward(folder: Path, base: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    objective = {"method": "reward", **sections.pop("objective", {})}
    return write_recipe(folder, base, rows, objective=objective, **sections)


def scores_of(target: Path, base: str | None, file: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    generate_verb(str(target), base, None, None, ["model.dtype=float32"], score=str(file))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.drawn
def test_a_run_learns_and_its_folder_is_used_by_every_verb(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(write_reward(tmp_path, base, training={"epochs": 12, "eval_steps": 40, "learning_rate": 0.01}))
    assert losses(run)[-1] < 0.3
    last = [record for record in records(run) if "loss" in record][-1]
    assert last["rewards_accuracies"] == 1.0
    assert last["rewards_margins"] == pytest.approx(last["rewards_chosen"] - last["rewards_rejected"], abs=1e-6)
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "after.json"), [])
    after = json.loads((tmp_path / "after.json").read_text("utf-8"))
    assert set(SCORES) < set(after)
    asked = [row["prompt"] + row["chosen"] for row in pairs(3)]
    rows = [{"messages": turns} for turns in asked]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = scores_of(run, None, file, capsys)
    assert [row["messages"] for row in found] == asked
    # transformers and peft read the folder, and the merged model, and give the same scores.
    tokenizer = AutoTokenizer.from_pretrained(base)
    bare = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(bare, str(run / "adapter")).eval()
    merge_verb(str(run / "adapter"), str(tmp_path / "merged"), str(base), None, [])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_labels == 1
    for row, turns in zip(found, asked, strict=True):
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            assert row["score"] == pytest.approx(float(theirs(input_ids=ids).logits), abs=1e-4)
            assert row["score"] == pytest.approx(float(merged(input_ids=ids).logits), abs=1e-4)
    again = scores_of(tmp_path / "merged", None, file, capsys)
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in found], abs=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded: Any = load_target(find_target(str(tmp_path / "theirs"), str(base), ["model.dtype=float32"]), CPU)
    assert [value for _, value in score_file(loaded, file)] == pytest.approx([row["score"] for row in found], abs=1e-4)
    loaded = load_target(find_target(str(run / "adapter"), None, []), CPU)
    with pytest.raises(InputError, match="trained with reward, which does not generate answers"):
        answer(loaded, ["say 3"])
    file.write_text('{"prompt": "p", "completion": ""}\n', encoding="utf-8")
    with pytest.raises(TunekitError, match=r"answers\.jsonl:1: empty answer"):
        score_file(loaded, file)
    with pytest.raises(InputError, match="trained with sft, so it gives no scores"):
        score_file(replace(loaded, objective=objective_of()), file)


@pytest.mark.drawn
def test_micro_batches_layouts_engines_and_interruptions_are_one_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_it_is_one_run(write_reward, base, tmp_path, monkeypatch, objective={"center_rewards_coefficient": 0.01})


def test_what_cannot_be_is_said(base: Path, bert: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(8)]
    with pytest.raises(TunekitError, match=r"model\.name_or_path: the base is an encoder"):
        raise_refusals(make_plan(load_recipe(write_reward(tmp_path, bert, rows)), device=CPU)[0])
    with pytest.raises(TunekitError, match="exact_match needs text answers"):
        load_recipe(write_reward(tmp_path, base, evaluation={"metrics": ["exact_match"]}))
    recipe = write_reward(tmp_path, base, [*rows[:4], {**rows[0], "margin": "much"}])
    with pytest.raises(TunekitError, match=r"train\.jsonl:5: 'margin' must be a number, not 'much'"):
        make_plan(load_recipe(recipe), device=CPU)


def test_another_tools_names_are_read_and_a_base_of_other_labels_gets_a_new_head(base: Path, tmp_path: Path) -> None:
    recipe = write_reward(tmp_path, base)
    values = json.loads(recipe.read_text("utf-8"))
    del values["objective"]
    theirs = {"stage": "rm", "center_rewards_coefficient": 0.01}
    recipe.write_text(json.dumps({**values, **theirs}), encoding="utf-8")
    assert load_recipe(recipe).recipe.objective == RewardSettings(center_rewards_coefficient=0.01)
    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    net.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "three")
    steps = {"max_steps": 1, "epochs": None}
    run = train(write_reward(tmp_path / "run", tmp_path / "three", data={"eval": None}, training=steps))
    assert len(losses(run)) == 1
