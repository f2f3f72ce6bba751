"""GRPO and RLOO: every loss, normaliser, KL and logged number against trl's trainers; whole runs; what is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.objectives.test_dpo import CPU, write_recipe
from tests.objectives.test_dpo import base as base
from tests.objectives.test_reward import write_reward
from tests.objectives.test_rewards import loaded
from tests.support.pair_case import on_two_ranks
from tests.support.plans import make_plan
from tests.support.sample_case import Case
from tests.support.train_case import lose_the_end, losses, records, tensors_of, train, without_times
from tunekit.companions.base import load_companions
from tunekit.contracts import Gather, StepBatches
from tunekit.data.batching.steps import evaluation_batches
from tunekit.data.rows import load_rows
from tunekit.errors import DataError, InputError, RecipeError, RewardError, RunFolderError, Stopped
from tunekit.evaluate import evaluate_verb
from tunekit.evaluation.evaluator import Evaluation, Evaluator
from tunekit.evaluation.scores import summed_evaluation
from tunekit.formats.example import Message
from tunekit.formats.preference import PromptedExample
from tunekit.formats.prompt import make_example
from tunekit.generate import answer, score_file
from tunekit.merge import merge_verb
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.prompts import Completion
from tunekit.preview import preview_verb
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.grpo import GrpoSettings
from tunekit.recipe.objectives.rloo import RlooSettings
from tunekit.targets.target import find_target, load_target
from tunekit.train import train_verb
from tunekit.training.state import LoopState
from tunekit.tuned.model import ModelRun, TunedModel
from tunekit.validate import validate

GRPO: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 0.3, "scale_rewards": "batch"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "beta": 0.1},
    "gspo, cispo": {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.02},
    "kl": {"beta": 0.2},
    "kl without the ratio": {"beta": 0.2, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "truncated left out": {"mask_truncated_completions": True, "beta": 0.1},
    "truncated left out of means": {"mask_truncated_completions": True, "loss_type": "grpo"},
}
RLOO: dict[str, dict[str, Any]] = {
    "plain": {"beta": 0.0},
    "kl": {"beta": 0.3, "epsilon": 0.01},
    "normalised": {"beta": 0.05, "normalize_advantages": True, "mask_truncated_completions": True},
}
CASES = [(GrpoSettings, values, name) for name, values in GRPO.items()]
CASES += [(RlooSettings, values, f"rloo, {name}") for name, values in RLOO.items()]
NOT_LOGGED = {  # least and largest of single completions, which are no sums, and trl's own counter
    *("clip_ratio_low_min", "clip_ratio_high_max", "num_tokens", "completions_min_terminated_length"),
    "completions_max_terminated_length",
}


@pytest.mark.parametrize("off_policy", [False, True], ids=["on policy", "off policy"])
@pytest.mark.parametrize(("kind", "values", "name"), CASES, ids=[name for _, _, name in CASES])
def test_losses_gradients_and_what_is_logged_are_trls(
    kind: Any, values: dict[str, Any], name: str, off_policy: bool, tmp_path: Path
) -> None:
    case = Case(tmp_path, kind, values, off_policy)
    expected, theirs = case.theirs()
    (gradient,) = torch.autograd.grad(expected, case.policy.values)
    assert float(gradient.abs().max()) > 1e-3
    for sizes, layout, order in CUTS:
        loss, logged, _ = case.ours(sizes, layout, order)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
        (found,) = torch.autograd.grad(loss, case.policy.values)
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)
        assert logged.pop("frac_reward_none") == pytest.approx(1 / 12), "which trl does not log"
        assert logged == pytest.approx({key: theirs[key] for key in logged}, rel=1e-5, abs=1e-7)
        assert set(theirs) - set(logged) <= NOT_LOGGED


CUTS: list[Any] = [  # micro-batches, layout, order of the prompts
    ((4,), (True, True), (0, 1, 2, 3)),
    ((1, 2, 1), (True, False), (2, 0, 3, 1)),
    ((3, 1), (False, False), (1, 3, 0, 2)),
]


def test_ranks_together_prepare_what_one_does(tmp_path: Path) -> None:
    """Two ranks with a part of the step each: advantages over the whole step's spread, one normaliser, the same log."""
    case = Case(tmp_path, GrpoSettings, {"scale_rewards": "batch"})
    _, whole, step = case.ours((1, 1, 1, 1))
    objective = case.objective().laid_out(True, True)
    rows = case.rows(objective)

    def prepared(number: int, gather: Gather) -> StepBatches:
        share = [objective.rows.collate([[row]]) for row in rows[number::2]]
        return objective.prepare_step(case.run(objective.rows, gather), StepBatches(3, 0.0, (0, 1), tuple(share), 5))

    with case.log_probabilities():
        found = on_two_ranks(prepared)
    for number in range(2):
        metrics = found[number].preparation.metrics
        assert metrics == pytest.approx({name: whole[name] for name in metrics}, rel=1e-12)
        for batch, alone in zip(found[number].batches, step.batches[number::2], strict=True):
            for name in ("advantages", "weights", "share"):
                torch.testing.assert_close(batch.targets[name], alone.targets[name], rtol=1e-6, atol=1e-7)


def test_later_steps_reuse_the_samples_of_an_earlier_one(tmp_path: Path) -> None:
    """The caller keeps the earlier step. Without it, a dry-run step makes its own completions; nothing else is kept."""
    case = Case(tmp_path, GrpoSettings, {"num_iterations": 3})
    objective = case.objective()
    batches = tuple(objective.rows.collate([[row]]) for row in case.rows(objective))
    run = case.run(objective.rows)
    with case.log_probabilities():
        first = objective.prepare_step(run, StepBatches(3, 0.0, (0, 1, 2, 3), batches, 5))
    run.generate = lambda *_, **__: pytest.fail("no new completions")  # type: ignore[method-assign]
    second = objective.prepare_step(run, StepBatches(4, 0.0, (0, 1, 2, 3), batches, 5), first)
    third = objective.prepare_step(run, StepBatches(5, 0.0, (0, 1), batches[:2], 5), second)
    assert second.batches == first.batches
    assert third.batches == first.batches[:2], "a calibration shortens its last step"
    assert third.preparation == second.preparation == replace(first.preparation, seconds={})
    assert set(first.preparation.seconds) == {"sample", "reward"}
    with pytest.raises(AssertionError):
        objective.prepare_step(run, StepBatches(4, 0.0, (0, 1, 2, 3), batches, 5))


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    case = Case(tmp_path, GrpoSettings, {})
    objective = case.objective()
    batch = objective.rows.collate([[row] for row in case.rows(objective)])
    other = RewardError("rewards.py: score raised ValueError on another rank")
    with pytest.raises(RewardError, match="on another rank"):
        objective.prepare_step(
            case.run(objective.rows, lambda local: [*local, other]), StepBatches(3, 0.0, (0,), (batch,), 5)
        )


def test_a_reward_that_fails_in_an_evaluation_is_raised_on_all_ranks(base: Path, tmp_path: Path) -> None:
    """The ranks share the rows, so that only one of them meets the one that no reward is for."""
    code = CODE.replace("isdigit() for text in answer)", "isdigit() and text != '3' for text in answer)")
    loaded = load_recipe(write_prompts(tmp_path, base, code=code, data={"eval": ["train.jsonl"]}))
    base_model = load_model(loaded.recipe.model, device=CPU)
    tokenizer = load_tokenizer(loaded.recipe.model)
    loaded_rows = load_rows(loaded.recipe.data, make_objective(loaded.recipe.objective, tokenizer), seed=0)
    rows, objective = loaded_rows.evaluation, loaded_rows.objective.evaluation_copy()
    assert rows is not None
    model = TunedModel(base_model, None, companions=load_companions(objective, CPU))

    def evaluated(number: int, gather: Gather) -> str:
        devices: Any = SimpleNamespace(rank=number, world=2, any=lambda said: any(gather([said])), gather=gather)
        batches = evaluation_batches(rows, objective.rows, batch_size=1)
        try:
            summed_evaluation(model, objective, batches, devices)
        except RewardError as error:
            return str(error)
        return "no error"

    found = on_two_ranks(evaluated)
    assert "letters raised AssertionError" in found[0]
    assert found[0] == found[1]


# Whole runs.


CODE = """
def letters(completions, answer, **columns):
    assert all(text.isdigit() for text in answer)
    return [sum(letter in "aeiou" for letter in said[0]["content"]) / 10 for said in completions]
"""
ONE = {"function": "rewards.py:letters", "allow_code": True}


def write_prompts(folder: Path, base: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.py").write_text(sections.pop("code", CODE), encoding="utf-8")
    asked = [
        {"prompt": [{"role": "user", "content": f"say {'very ' * (n % 5)}{n}"}], "answer": str(n), "level": n}
        for n in range(24)
    ]
    few = {"method": "grpo", "num_generations": 3, "max_completion_length": 6, "reward": [ONE]}
    objective = {**few, **sections.pop("objective", {})}
    return write_recipe(folder, base, rows or asked, objective=objective, **sections)


def measured(target: Path, *overrides: str) -> dict[str, float]:
    evaluate_verb(str(target), None, None, None, [], str(target.parent / "eval.json"), list(overrides), allow_code=True)
    return json.loads((target.parent / "eval.json").read_text("utf-8"))  # type: ignore[no-any-return]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_run_learns_and_its_folder_is_used_by_every_verb(
    method: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"method": method, "num_generations": 8, "max_completion_length": 12, "beta": 0.01, "temperature": 0.5}
    recipe = write_prompts(
        tmp_path, base, objective=objective, training={"epochs": 8, "eval_steps": 12, "learning_rate": 0.02}
    )
    run = train(recipe)
    steps = [record for record in records(run) if "loss" in record]
    assert abs(steps[0]["kl"]) < 1e-6, "the policy is its own reference"
    assert [step["reward"] for step in steps] == [step["rewards_letters_mean"] for step in steps]
    assert sum(step["reward"] for step in steps[-6:]) > 1.4 * sum(step["reward"] for step in steps[:6])
    assert steps[-1]["kl"] > 0.01
    assert [step["step"] for step in steps if "samples" in step] == [1, 12, 24]
    sample = steps[-1]["samples"][0]
    assert set(sample) == {"prompt", "completion", "answer", "ended", "rewards", "advantage"}
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert {"sample", "reward", "train"} <= set(report["seconds"])
    assert report["final_reward"] > 1.4 * report["first_reward"]
    assert "Completions used for training" in (run / "report.html").read_text("utf-8")
    report = (run / "report.md").read_text("utf-8")
    assert "Mean reward of the model's samples" in report
    assert "Evaluation loss" not in report, "a loss that is 0 in every step is no verdict"
    evaluations = [record["eval"] for record in records(run) if "eval" in record]
    assert evaluations[-1]["reward"] > evaluations[0]["reward"] + 0.1
    after = measured(run)
    assert after["reward"] == pytest.approx(evaluations[-1]["reward"], rel=1e-6)
    assert after["loss"] == -after["reward"]
    assert measured(run, "evaluation.batch_size=1")["reward"] == pytest.approx(after["reward"], rel=1e-6)
    loaded = load_target(find_target(str(run), None, ["evaluation.max_new_tokens=3"]), CPU)
    assert len(answer(loaded, ["say 3", "say very 1"])) == 2
    merge_verb(str(run / "adapter"), str(tmp_path / "merged"), str(base), None, [])
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    capsys.readouterr()
    preview_verb(load_recipe(recipe), 1, None)
    shown = capsys.readouterr().out
    assert "prompt, answer: " in shown
    assert "completions of an epoch" in shown


@pytest.mark.drawn
def test_micro_batches_layouts_and_interruptions_are_one_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(name: str, micro_batch_size: int) -> Path:
        steps = {"micro_batch_size": micro_batch_size, "gradient_accumulation_steps": 6 // micro_batch_size}
        training = {**steps, "epochs": 1, "save_steps": 2, "eval_steps": 1}
        objective = {"beta": 0.05, "temperature": 0.9, "top_p": 0.95, "top_k": 100}
        return write_prompts(tmp_path / name, base, data={"eval": None}, training=training, objective=objective)

    run = train(recipe("whole", 2))
    whole, tensors, log = losses(run), tensors_of(run), without_times(records(run))
    lose_the_end(run)
    train(run.parent / "recipe.yaml", resume=True)
    assert tensors_of(run) == tensors
    assert without_times(records(run)) == log, "samples included"
    for name, size, keeps, shares in (("alone", 1, True, True), ("apart", 3, True, False), ("padded", 6, False, False)):
        monkeypatch.setattr("tunekit.planning.prepare.keeps_documents_apart", lambda net, keeps=keeps: keeps)
        monkeypatch.setattr("tunekit.planning.prepare.shares_prefixes", lambda net, longest, shares=shares: shares)
        other = train(recipe(name, size))
        assert losses(other) == pytest.approx(whole, rel=1e-4, abs=1e-6)
        for ours, theirs in zip(records(other), log, strict=True):
            assert [each["completion"] for each in ours["samples"]] == [
                each["completion"] for each in theirs["samples"]
            ]


@pytest.mark.drawn
def test_a_changed_reward_file_is_not_resumed(base: Path, tmp_path: Path) -> None:
    recipe = write_prompts(
        tmp_path, base, training={"epochs": 1, "save_steps": 1, "micro_batch_size": 6}, data={"eval": None}
    )
    lose_the_end(train(recipe))
    changed = CODE.replace("10", "20") + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (tmp_path / "rewards.py").write_text(changed, encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"objective\.reward\.0\.function: changed since the run: its content is"):
        train(recipe, resume=True)
    assert not (tmp_path / "ran").exists(), "a run that is refused runs none of the code"


@pytest.mark.drawn
def test_a_mended_reward_is_resumed_where_the_user_accepts_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from judge import judged\n\ndef letters(completions):\n    return judged(completions)\n"
    judge = (
        "calls = []\ndef judged(said):\n    calls.append(1)\n    return [float(at) for at, _ in enumerate(said)]{}\n"
    )
    (tmp_path / "judge.py").write_text(judge.format("[: 18 if len(calls) < 3 else 0]"), encoding="utf-8")
    recipe = write_prompts(tmp_path, base, code=code, data={"eval": None}, training={"epochs": 1})
    with pytest.raises(InputError, match=r"(?s)0 rewards for 18.*add --accept-changed objective\.reward"):
        train(recipe)
    (tmp_path / "judge.py").write_text(judge.format(""), encoding="utf-8")
    sys.modules.pop("judge")
    said = (
        r"objective\.reward\.0\.function: changed since the run: its content is different; undo the change \(also in "
    )
    with pytest.raises(
        RunFolderError, match=said + r"files that it loads\), accept it with --accept-changed objective\.reward"
    ):
        train(recipe, resume=True)
    loaded = load_recipe(recipe)
    with pytest.raises(
        RunFolderError, match=r"--accept-changed objective\.rewrad: this run has no file under this key"
    ):
        train_verb(loaded, True, False, accepted=["objective.rewrad"])
    with pytest.raises(InputError, match="--accept-changed only has an effect with --resume"):
        train_verb(loaded, False, False, accepted=["objective.reward"])
    train_verb(loaded, True, False, accepted=["objective.reward"])
    report = json.loads((tmp_path / "run" / "report.json").read_text("utf-8"))
    accepted = {"probe": "objective.reward.0.function: its files have changed since the run started", "step": 2}
    assert accepted.items() <= report["reactions"][0].items()
    assert "resumed with the changed files, as --accept-changed allows" in capsys.readouterr().err
    assert len([record for record in records(tmp_path / "run") if "loss" in record]) == 4


WRONG = [
    ("    raise KeyError('x')", r"rewards\.py: letters raised KeyError: 'x' \(line 3\)"),
    ("    return None", "letters returned None; return a list"),
    ("    return [None for _ in completions]", "letters returned None or NaN for all"),
    ("    return [float('nan')] * len(completions)", "letters returned None or NaN for all"),
    ("    return [1.0]", "letters returned 1 rewards for "),
    ("    return 1.0", "letters returned float '1.0', which is not a list"),
    ("    return ['1'] * len(completions)", "letters returned str '1' for a completion; return a finite number"),
    ("    return [float('inf')] * len(completions)", "letters returned float 'inf' for a completion"),
    ("    yield 1 / 0", r"letters raised ZeroDivisionError: division by zero \(line 3\)"),
    ("    return {text: 1.0 for text in completions}", "letters returned dict .*, which is not a list"),
    ("    return [10**400 for _ in completions]", "letters returned int '1000"),
    ("    raise SystemExit(3)", "letters raised SystemExit: 3"),
]


@pytest.mark.parametrize(("body", "said"), WRONG)
def test_what_is_no_reward_is_named(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "rewards.py").write_text(f"\ndef letters(completions, **columns):\n{body}\n", encoding="utf-8")
    rewards = loaded(ONE | {"function": f"{tmp_path}/rewards.py:letters"})
    with pytest.raises(RewardError, match=said):
        rewards.scored_by(0, [Completion("p", {"answer": "1"}, text) for text in ("a", "b")])


@pytest.mark.drawn
def test_a_reward_may_be_silent_on_the_rows_of_a_step_and_of_an_evaluation(base: Path, tmp_path: Path) -> None:
    """Two rewards for two kinds of rows, a row at a time; and some rows that neither can judge."""
    rows = [{"prompt": f"say {n}", **({"right": "7"} if n % 3 else {})} for n in range(12)]
    code = """
calls = []
def letters(completions, right=None):
    calls.append(1)
    return [float(len(calls)) if said is None and len(calls) % 4 else None for said in right or completions]
"""
    objective = {"reward": [ONE, {"exact_match": "right"}], "num_generations": 2, "max_completion_length": 3}
    one = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "epochs": 1}
    recipe = write_prompts(
        tmp_path, base, rows, code=code, objective=objective, training=one, evaluation={"batch_size": 1}
    )
    run = train(recipe)
    assert sum("loss" in record for record in records(run)) == 9
    silent = code.replace("float(len(calls))", "None")
    silent_one = {**objective, "reward": [ONE]}
    alone = write_prompts(tmp_path / "b", base, rows, code=silent, objective=silent_one)
    with pytest.raises(DataError, match=r"data\.eval: no reward returned a number for any of the 3"):
        train(alone)
    alone = write_prompts(tmp_path / "c", base, rows, code=silent, objective=silent_one, data={"eval": None})
    with pytest.raises(RewardError, match="letters returned None or NaN for all 12 completions"):
        train(alone)


@pytest.mark.drawn
def test_a_reward_that_falls_silent_is_warned_about_at_once_and_ends_the_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two silent steps, two with rewards, then none any more."""
    code = """
calls = []
def letters(completions):
    calls.append(1)
    return [float(len(calls) + at) if len(calls) in (1, 4, 5) else None for at, _ in enumerate(completions)]
"""
    objective = {"num_generations": 2, "max_completion_length": 1}
    training = {"max_steps": 60, "epochs": None, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    recipe = write_prompts(tmp_path, base, code=code, objective=objective, training=training, data={"eval": None})
    said = r"(?s)letters returned None or NaN for all 2 completions in each of the last 20 steps.*step 24 is written"
    with pytest.raises(InputError, match=said):
        train(recipe)
    shares = [(each["frac_reward_zero_std"], each["frac_reward_none"]) for each in records(tmp_path / "run")]
    assert shares == [(0.0, 0.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0), *[(1.0, 1.0)] * 19]
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("step 2: no completion of the step has a reward") == 1
    assert (printed.out + printed.err).count("no completion of the step has a reward") == 1, "once in a run"


def test_completions_that_are_left_out_of_the_loss_have_their_length(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"mask_truncated_completions": True, "max_completion_length": 2}
    recipe = write_prompts(tmp_path, base, objective=objective, training={"max_steps": 1, "epochs": None})
    (found, *_) = [record["eval"] for record in records(train(recipe)) if "eval" in record]
    assert found["completions_clipped_ratio"] == 1.0, "none of them counts"
    assert found["completions_mean_length"] == 2.0
    assert "does not read" not in capsys.readouterr().out, "rewards get every column"


def test_a_source_of_rows_that_nothing_can_judge_has_no_metrics(base: Path, tmp_path: Path) -> None:
    for name, row in (("a", {"prompt": "say 1", "answer": "7"}), ("b", {"prompt": "say 2"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    recipe = write_prompts(
        tmp_path,
        base,
        objective={"reward": [{"exact_match": "answer"}]},
        data={"eval": ["a.jsonl", "b.jsonl"]},
        training={"max_steps": 1, "epochs": None},
    )
    (found,) = [record["sources"] for record in records(train(recipe)) if record.get("eval") and record["step"] == 1]
    assert found["a.jsonl"] == {**found["a.jsonl"], "rows": 1, "reward": 0.0}
    assert found["b.jsonl"] == {"rows": 1}


def test_a_reward_that_fails_ends_the_run_after_a_checkpoint(base: Path, tmp_path: Path) -> None:
    code = CODE + "    calls.append(1)\n    return [0.0] * (len(calls) < 3)\ncalls = []\n"
    code = code.replace("    return [sum", "    if len(calls) < 2:\n        calls.append(1)\n        return [sum")
    recipe = write_prompts(tmp_path, base, code=code, data={"eval": None}, training={"epochs": 1})
    with pytest.raises(InputError, match=r"(?s)0 rewards for 18 completions.*the checkpoint of step 2 is written"):
        train(recipe)
    assert (recipe.parent / "run" / "checkpoints" / "step-000002").is_dir()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"reward": [{"function": "rewards.py:letters"}]}, r"reward\.0\.function: needs allow_code: true"),
    ({"reward": [{"function": "absent.py:letters", "allow_code": True}]}, r"absent\.py: no such file; check the path"),
    ({"reward": [{"function": "rewards.py", "allow_code": True}]}, r"must be FILE\.py:NAME"),
    ({"reward": [{"regex": "("}]}, "must be a regular expression"),
    ({"reward": [{"regex": "a", "exact_match": "answer"}]}, "has regex and exact_match"),
    ({"reward": [{"weight": 2.0}]}, "has none"),
    ({"reward": []}, "must not be empty"),
    ({"reward": [{"regex": "a", "weight": 0}]}, "all weights are 0, so all rewards are equal"),
    ({"reward": None}, r"objective\.reward: must be a list, not empty"),
    ({"reward": [{"model": "absent"}]}, "absent: no such folder"),
    ({"num_generations": 1}, "must be at least 2 \\(each completion is compared with the others"),
    ({"loss_type": "bnpo"}, "bnpo divides by the tokens of each micro-batch, so the result would depend"),
    ({"loss_type": "cispo"}, "cispo needs epsilon_high, the maximum of the probability ratio"),
    ({"temperature": 0.0}, "must be greater than 0"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED)
def test_the_recipe_is_refused(base: Path, tmp_path: Path, values: dict[str, Any], said: str) -> None:
    recipe = write_prompts(tmp_path, base, objective=values)
    with pytest.raises(RecipeError, match=said):
        validate(str(recipe))


ROWS: list[tuple[dict[str, Any], str]] = [
    ({"answer": "x"}, "no prompt; this row has 'answer'"),
    ({"prompt": ""}, "the row has no prompt; correct the row, or write objective.unusable_rows: drop"),
    ({"prompt": 3}, "'prompt' must be text"),
    ({"prompt": "p", "answer": "1", "notes": ["\ud83d"]}, r"'notes' contains the lone surrogate \\ud83d"),
]


@pytest.mark.parametrize(("row", "said"), ROWS)
def test_a_bad_row_is_named(base: Path, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    recipe = write_prompts(tmp_path, base, rows=[{"prompt": "p", "answer": "1"}, row])
    with pytest.raises(DataError, match=rf"train\.jsonl:2: {said}"):
        make_plan(load_recipe(recipe), device=CPU)


def test_a_column_that_no_row_has_is_refused_by_plan(base: Path, tmp_path: Path) -> None:
    rewards = [ONE, {"exact_match": "answer"}, {"exact_match": "anwser"}]
    plan, _ = make_plan(load_recipe(write_prompts(tmp_path, base, objective={"reward": rewards})), device=CPU)
    (refusal,) = plan.refusals
    assert refusal.key == "objective.reward.2.exact_match"
    assert refusal.message.startswith("no row has the column 'anwser'; the first row has: answer, level")


def test_messages_on_shared_completions_and_their_length_name_both_keys(base: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(
        load_recipe(write_prompts(tmp_path, base, objective={"num_iterations": 3}, training={"save_steps": 4})),
        device=CPU,
    )
    (refusal,) = plan.refusals
    assert refusal.key == "training.save_steps"
    assert refusal.message.startswith("4 is not a multiple of objective.num_iterations, 3: ")
    recipe = write_prompts(tmp_path, base, objective={"max_completion_length": 126})
    said = "24 longer than max_length with room for objective.max_completion_length; raise data.max_length"
    with pytest.raises(DataError, match=said):
        make_plan(load_recipe(recipe), device=CPU)
    recipe = write_prompts(tmp_path, base, objective={"max_completion_length": 126}, data={"excess_length": "error"})
    with pytest.raises(DataError, match=r"tokens with room for objective\.max_completion_length, but data\.max"):
        make_plan(load_recipe(recipe), device=CPU)


def test_a_text_metric_without_reference_answers_is_refused(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {number}"} for number in range(8)]
    metrics = {"metrics": ["loss", "exact_match"]}
    recipe = write_prompts(tmp_path, base, rows, objective={"reward": [{"regex": "a"}]}, evaluation=metrics)
    (refusal,) = make_plan(load_recipe(recipe), device=CPU)[0].refusals
    assert refusal.key == "evaluation.metrics"
    assert refusal.message.startswith("exact_match compares with reference answers, but no evaluation row has one; add")


def test_a_streamed_base_and_cut_prompts_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    for key, value in (("streaming", "disk"), ("streamed_head", True)):
        plan, _ = make_plan(load_recipe(write_prompts(tmp_path, base, memory={key: value})), device=CPU)
        (refusal,) = plan.refusals
        assert refusal.key == f"memory.{key}"
        assert "grpo samples token by token, so every layer would be copied for each token" in refusal.message
    with pytest.raises(RecipeError, match="a truncated prompt is a different question"):
        make_plan(load_recipe(write_prompts(tmp_path, base, data={"excess_length": "truncate"})), device=CPU)


@pytest.mark.drawn
def test_equal_rewards_and_truncated_completions_are_said(base: Path, tmp_path: Path) -> None:
    objective = {"reward": [{"regex": "never said"}], "num_generations": 2, "max_completion_length": 1}
    training = {"max_steps": 21, "epochs": None, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    run = train(write_prompts(tmp_path, base, objective=objective, training=training, data={"eval": None}))
    report = json.loads((run / "report.json").read_text("utf-8"))
    told = {each["probe"]: each["step"] for each in report["reactions"]}
    assert told["for every prompt, all completions got the same reward or no reward for 20 steps"] == 20
    assert any("reached max_completion_length" in probe for probe in told)


def test_every_layout_of_prompts_is_read() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows: list[tuple[dict[str, Any], Any, str | None, dict[str, Any]]] = [
        ({"prompt": "p", "completion": "c"}, "p", "c", {"completion": "c"}),
        ({"prompt": turns[:1], "answer": 7, "level": 3}, turns[:1], "7", {"answer": 7, "level": 3}),
        ({"messages": turns}, turns[:1], "ho", {}),
        ({"prompt": turns[:1], "completion": turns[1:]}, turns[:1], "ho", {"completion": turns[1:]}),
        ({"question": "q", "answer": "a"}, [{"role": "user", "content": "q"}], "a", {"answer": "a"}),
        ({"prompt": "p", "system": "s"}, "s\n\np", None, {}),
    ]
    for row, prompt, reference, columns in rows:
        example = make_example(row)
        assert (example.prompt_value, example.answer, dict(example.columns)) == (prompt, reference, columns)


@pytest.mark.drawn
def test_a_reward_model_of_ones_own_is_asked(base: Path, tmp_path: Path) -> None:
    model = train(write_reward(tmp_path / "model", base, training={"epochs": 1}))
    objective = {"reward": [{"model": str(model)}, {"exact_match": "answer", "weight": 2.0}]}
    recipe = write_prompts(tmp_path / "grpo", base, objective=objective, training={"epochs": 1})
    run = train(recipe)
    steps = [record for record in records(run) if "loss" in record]
    for step in steps:
        both = step["rewards_model_mean"] + 2 * step["rewards_exact_match_mean"]
        assert step["reward"] == pytest.approx(both, rel=1e-6)
    assert measured(run)["reward"] == pytest.approx([r["eval"] for r in records(run) if "eval" in r][-1]["reward"])
    (sample,) = steps[0]["samples"][:1]
    asked = PromptedExample((Message("user", sample["prompt"].split("\n")[1].removesuffix("<|im_end|>")),))
    rows = tmp_path / "rows.jsonl"
    said = {"role": "assistant", "content": sample["completion"]}
    rows.write_text(
        json.dumps({"messages": [{"role": "user", "content": asked.prompt[0].content}, said]}), encoding="utf-8"
    )
    ((_, score),) = score_file(load_target(find_target(str(model), None, []), CPU), rows)
    assert sample["rewards"]["model"] == pytest.approx(score, rel=1e-4, abs=1e-6)
    plain = write_prompts(tmp_path / "plain", base, training={"epochs": 1})
    more = [make_plan(load_recipe(path), device=CPU)[0].peak_bytes for path in (recipe, plain)]
    assert more[0].weights > more[1].weights, "the reward model's weights are planned"
    with pytest.raises(
        RecipeError, match=r"objective\.reward\.0\.model: the model was trained with the objective grpo, so it"
    ):
        train(write_prompts(tmp_path / "other", base, objective={"reward": [{"model": str(run)}]}))


@pytest.mark.drawn
def test_an_adapter_folder_alone_still_answers(base: Path, tmp_path: Path) -> None:
    run = train(write_prompts(tmp_path, base, training={"epochs": 1}, data={"eval": None}))
    (run / "adapter").rename(tmp_path / "alone")
    loaded = load_target(find_target(str(tmp_path / "alone"), str(base), ["evaluation.max_new_tokens=3"]), CPU)
    assert loaded.objective.name == "sft"
    assert len(answer(loaded, ["say 3"])) == 1


@pytest.mark.drawn
def test_steps_repeat_their_completions(base: Path, tmp_path: Path) -> None:
    """Each step twice in a row, the second time off policy; a run is gone on with before a first time alone."""
    objective = {"num_iterations": 2, "epsilon": 0.001, "num_generations": 6}
    steps = {"micro_batch_size": 3, "gradient_accumulation_steps": 2, "epochs": 1}
    training = {**steps, "save_steps": 4, "eval_steps": 1, "learning_rate": 0.05}
    recipe = write_prompts(tmp_path, base, objective=objective, training=training, data={"eval": None})
    run = train(recipe)
    log = [record for record in records(run) if "loss" in record]
    assert len(log) == 8, "24 prompts in steps of 6, twice each"
    said = [[each["completion"] for each in record["samples"]] for record in log]
    assert said[0::2] == said[1::2]
    assert said[0] != said[2]
    assert all(record["clip_ratio_region_mean"] < 1e-6 for record in log[0::2])
    assert max(record["clip_ratio_region_mean"] for record in log[3::2]) > 0.01
    tensors, kept = tensors_of(run), without_times(records(run))
    lose_the_end(run)
    train(recipe, resume=True)
    assert tensors_of(run) == tensors
    assert without_times(records(run)) == kept
    odd = write_prompts(tmp_path / "odd", base, objective=objective, training={"save_steps": 3})
    (refusal,) = make_plan(load_recipe(odd), device=CPU)[0].refusals
    assert refusal.key == "training.save_steps"
    assert "write a multiple of 2" in refusal.message


def test_an_error_between_steps_that_share_completions_keeps_the_last_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"epochs": 1, "save_steps": 2, "eval_steps": 3}
    recipe, whole = (
        write_prompts(tmp_path / name, base, objective={"num_iterations": 2}, training=training)
        for name in ("run", "whole")
    )
    seen, evaluate = list[int](), Evaluator.evaluate

    def failing(evaluator: Evaluator, *given: Any) -> Evaluation:
        seen.append(1)
        if len(seen) == 2:
            raise RewardError("rewards.py: letters raised ValueError")
        return evaluate(evaluator, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "evaluate", failing)
        with pytest.raises(InputError, match="the checkpoint of step 2 is written; continue with --resume"):
            train(recipe)
    run, other = train(recipe, resume=True), train(whole)
    assert tensors_of(run) == tensors_of(other)
    assert without_times(records(run)) == without_times(records(other))


def test_a_stop_waits_for_the_last_time(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it interrupt an evaluation before that, which no resume would repeat."""
    training = {"epochs": 1, "save_steps": 3, "eval_steps": 1}
    recipe = write_prompts(tmp_path, base, objective={"num_iterations": 3}, training=training)
    added, seen = LoopState.__setattr__, list[int]()

    def set_step(state: LoopState, name: str, value: Any) -> None:
        added(state, name, value)
        if name == "step" and value == 1 and not seen:
            seen.append(value)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LoopState, "__setattr__", set_step)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 3"):
        train(recipe)
    assert [record["step"] for record in records(tmp_path / "run") if "eval" in record] == [0, 1, 2]


def test_a_reward_is_required(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, [{"prompt": "p"}])
    recipe.write_text(json.dumps({**json.loads(recipe.read_text("utf-8")), "objective": "rloo"}), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"objective\.reward: is required; write reward: \[\{function: FILE\.py:NAME"):
        validate(str(recipe))


def test_what_samples_take_is_planned(base: Path, tmp_path: Path) -> None:
    """Keys and values of the completions that are written side by side, at their full length."""
    objective = {"num_generations": 2, "max_completion_length": 60}
    training = {"micro_batch_size": 1, "gradient_accumulation_steps": 16}
    peaks, longest = [], 0
    for name, size in (("few", 2), ("many", 32)):
        values = {"objective": {**objective, "sampling_batch_size": size}, "training": training}
        plan, prepared = make_plan(load_recipe(write_prompts(tmp_path / name, base, **values)), device=CPU)
        longest = max(len(prepared.rows.train[at].parts["prompt"]) for at in range(18)) + 60
        assert prepared.largest_batch.tokens == 2 * longest, "a micro-batch is planned with full completions"
        peaks.append(plan.peak_bytes)
    config = AutoConfig.from_pretrained(base)
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * 32 * longest * width * 4
    assert peaks[1].total > peaks[0].total
    assert peaks[1].activations > cache


@pytest.mark.sampled(1)
def test_as_many_completions_as_fit_are_sampled_together(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget for 16 completions at a time: the plan says so, and the run does so."""
    training = {"micro_batch_size": 1, "gradient_accumulation_steps": 16, "max_steps": 1, "epochs": None}

    def recipe(name: str, size: int, **sections: Any) -> Path:
        objective = {"num_generations": 2, "max_completion_length": 60, "sampling_batch_size": size}
        return write_prompts(tmp_path / name, base, objective=objective, training=training, **sections)

    enough, _ = make_plan(load_recipe(recipe("enough", 16)), device=CPU)
    assert "sampling: 16 completions in parallel; their keys and values, for up to" in "\n".join(enough.notes)
    budget = {"budget": f"{enough.peak_bytes.total * 10 // 9 + 1}B"}
    plan, _ = make_plan(load_recipe(recipe("many", 32, memory=budget)), device=CPU)
    assert (plan.choice.sampling_batch_size, plan.peak_bytes.total) == (16, enough.peak_bytes.total)
    assert any("32 in parallel do not fit into memory" in note for note in plan.notes)
    sizes, generate = list[int](), ModelRun.generate

    def noted(self: Any, *prompts: Any, **named: Any) -> Any:
        sizes.append(named["batch_size"])
        return generate(self, *prompts, **named)

    monkeypatch.setattr(ModelRun, "generate", noted)
    train(recipe("many", 32, memory=budget))
    assert 16 in sizes
    assert 32 not in sizes
