"""The reference model of an adapter that does not start as the base: the adapter as it is at step 0, frozen."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from tests.objectives.test_dpo import base as base
from tests.objectives.test_dpo import check_it_is_one_run, write_recipe
from tests.objectives.test_grpo import measured, write_prompts
from tests.objectives.test_kto import write_kto
from tests.support.plans import make_plan
from tests.support.train_case import lose_the_end, losses, records, tensors_of, train
from tests.support.train_case import write_recipe as write_chat_recipe
from tests.training.test_ranks import TORCHRUN, run_two
from tunekit.errors import AdapterError, InputError
from tunekit.recipe.load import load_recipe
from tunekit.targets.reference import load_reference
from tunekit.targets.target import find_target, load_target
from tunekit.tuned.model import ModelRun

CPU = torch.device("cpu")
FAST = {"learning_rate": 0.02, "epochs": 2}
SHORT = {"max_completion_length": 8, "num_generations": 2}


@pytest.fixture(scope="module")
def supervised(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supervised adapter that moves the base's log-probabilities far."""
    recipe = write_chat_recipe(
        tmp_path_factory.mktemp("supervised"), base, training={**FAST, "seed": 1}, adapter={"dropout": 0.0}
    )
    return train(recipe) / "adapter"


@pytest.mark.drawn
def test_a_continued_adapter_is_one_run(
    base: Path, supervised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_it_is_one_run(write_recipe, base, tmp_path, monkeypatch, adapter=continued(supervised))


def continued(supervised: Path) -> dict[str, Any]:
    settings = json.loads((supervised / "tunekit.json").read_text("utf-8"))["settings"]
    return {"r": settings["r"], "alpha": settings["alpha"], "init_from": str(supervised)}


STEPS = 5
TRAINING: dict[str, Any] = {
    "micro_batch_size": 6,
    "gradient_accumulation_steps": 1,
    "epochs": STEPS,
    "weight_decay": 0.0,
}
TRAINING |= {"scheduler": "constant", "warmup_ratio": 0.0, "learning_rate": 0.003, "max_grad_norm": 1.0}


def trl_run(
    trainer: Any,
    config: Any,
    base: Path,
    supervised: Path,
    rows: list[dict[str, Any]],
    values: dict[str, Any],
    **more: Any,
) -> Any:
    """trl's trainer after the same steps, whose reference is the adapter "ref", a copy of the one that it was given."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = config(
        output_dir=str(base / "trl"),
        num_train_epochs=STEPS,
        learning_rate=0.003,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **values,
    )
    trained = trainer(
        model=PeftModel.from_pretrained(model, str(supervised), is_trainable=True),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        **more,
    )
    assert "ref" in trained.model.peft_config
    trained.train()
    return trained


def check_it_equals(run: Path, trainer: Any, supervised: Path) -> None:
    """Losses of all steps, and the adapter after them."""
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == STEPS
    assert losses(run) == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    ours, start = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", supervised))
    state = get_peft_model_state_dict(trainer.model)
    assert set(ours) == set(state)
    apart, moved = (
        torch.cat([(ours[name] - other[name]).flatten() for name in ours]).norm() for other in (state, start)
    )
    assert moved > 0.1
    assert apart < 1e-4 * moved, "as a whole: AdamW makes a full step of a gradient that is only rounding"


@pytest.mark.drawn
def test_dpo_equals_trls_with_its_reference_adapter(base: Path, supervised: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}:", "chosen": f" so {n}", "rejected": " no" * (n + 1)} for n in range(6)]
    sections = {"data": {"eval": None}, "adapter": continued(supervised), "training": TRAINING}
    ours = train(write_recipe(tmp_path / "ours", base, rows, **sections))
    values = {"per_device_train_batch_size": 6, "max_length": None}
    theirs = trl_run(DPOTrainer, DPOConfig, base, supervised, rows, values)
    assert losses(ours)[-1] < losses(ours)[0] - 0.01
    check_it_equals(ours, theirs, supervised)


def test_kto_equals_trls_with_its_reference_adapter(base: Path, supervised: Path, tmp_path: Path) -> None:
    """One micro-batch to a step, of which trl takes the KL: ours is that of the whole step."""
    rows = [{"prompt": f"say {n}:", "completion": " so" * (n + 1), "label": n % 3 != 2} for n in range(6)]
    sections = {"data": {"eval": None}, "adapter": continued(supervised), "training": TRAINING}
    ours = train(write_kto(tmp_path / "ours", base, rows, objective={"beta": 0.5}, **sections))
    values = {"per_device_train_batch_size": 6, "max_length": None, "beta": 0.5}
    theirs = trl_run(KTOTrainer, KTOConfig, base, supervised, rows, values)
    kl = [record["kl"] for record in records(ours) if "kl" in record]
    assert max(kl) > 0.01
    assert kl == pytest.approx([entry["kl"] for entry in theirs.state.log_history if "kl" in entry], rel=1e-4, abs=1e-6)
    check_it_equals(ours, theirs, supervised)


REWARD = "def even(completion_ids, **columns):\n    return [sum(ids) % 7 / 7 for ids in completion_ids]\n"


def completions_of(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Others to each place of a prompt's group, the same in every step."""
    places, completions = Counter[tuple[int, ...]](), []
    for prompt in map(tuple, prompts):
        places[prompt] += 1
        draw = np.random.default_rng([*prompt, places[prompt]])
        completions.append([*draw.integers(3, 200, int(draw.integers(1, 6))).tolist(), 2])
    return completions


@pytest.mark.parametrize(
    ("method", "trainer", "config"), [("grpo", GRPOTrainer, GRPOConfig), ("rloo", RLOOTrainer, RLOOConfig)]
)
def test_samples_equal_trls_with_its_reference_adapter(
    method: str,
    trainer: Any,
    config: Any,
    base: Path,
    supervised: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same completions on both sides, two to each of six prompts of a step."""
    rows = [{"prompt": f"say {n}:"} for n in range(6)]
    settings = {"beta": 0.3, "num_generations": 2, "max_completion_length": 8}
    reward = {"function": "rewards.py:even", "allow_code": True}
    objective = {"method": method, "reward": [reward], **settings}
    sections = {"data": {"eval": None}, "adapter": continued(supervised), "training": TRAINING}
    generate = ModelRun.generate

    def given(self: ModelRun, tokenizer: Any, prompts: Any, **more: Any) -> Any:
        return generate(self, tokenizer, prompts, **more) if self.is_simulated else completions_of(prompts)

    def theirs(self: Any, prompts: Any, *more: Any) -> Any:
        completions = completions_of(prompts)
        return (completions, None) if method == "grpo" else completions  # grpo's: with the sampler's log-probabilities

    monkeypatch.setattr(ModelRun, "generate", given)
    monkeypatch.setattr(trainer, "_generate_single_turn", theirs)
    ours = train(write_prompts(tmp_path / "ours", base, rows, code=REWARD, objective=objective, **sections))
    exec(REWARD, namespace := dict[str, Any]())
    values = {"per_device_train_batch_size": 12, **settings}
    run = trl_run(trainer, config, base, supervised, rows, values, reward_funcs=namespace["even"])
    kl = [record["kl"] for record in records(ours) if "kl" in record]
    assert abs(kl[-1]) > 1e-4
    assert kl == pytest.approx([entry["kl"] for entry in run.state.log_history if "kl" in entry], rel=1e-3, abs=1e-6)
    check_it_equals(ours, run, supervised)


STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"start": "pissa"},
    "eva": {"start": "eva"},
    "hra": {"method": "hra"},
    "prompt": {"method": "prompt"},
    "prefix": {"method": "prefix"},
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("prompt", "hra", "prefix", "eva")]


@pytest.mark.drawn
@pytest.mark.parametrize("start", [None, "pissa", *SLOW])
def test_the_policy_at_step_0_is_its_own_reference(
    base: Path, supervised: Path, tmp_path: Path, start: str | None
) -> None:
    """The first step's margin is 0, so its loss is log 2; a resumed run is the uninterrupted one."""
    adapter = continued(supervised) if start is None else STARTS[start]
    recipe = write_recipe(tmp_path, base, data={"eval": None}, training={"save_steps": 2, "epochs": 1})
    values = json.loads(recipe.read_text("utf-8"))
    recipe.write_text(json.dumps({**values, "adapter": {"method": "lora", **adapter}}), encoding="utf-8")
    run = train(recipe)
    assert losses(run)[0] == pytest.approx(0.693147, abs=2e-5)
    assert losses(run)[-1] != pytest.approx(0.693147, abs=1e-4)
    whole = tensors_of(run)
    lose_the_end(run)
    train(recipe, resume=True)
    assert tensors_of(run) == whole


@pytest.mark.drawn
def test_a_resume_needs_no_folder_of_the_continued_adapter(base: Path, supervised: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(supervised, tmp_path / "supervised")
    recipe = write_recipe(tmp_path, base, adapter=continued(copied), training={"save_steps": 2, "epochs": 1})
    run = train(recipe)
    whole = tensors_of(run)
    lose_the_end(run)
    shutil.rmtree(copied)
    with pytest.raises(AdapterError, match=r"elsewhere/adapter_model\.safetensors: is missing"):
        train(recipe, f"adapter.init_from={tmp_path / 'elsewhere'}", resume=True)
    train(recipe, resume=True)
    assert tensors_of(run) == whole


OTHER = [
    ({"r": 8}, "has rank 4 and alpha 32.0 in the folder, but 8 and 32.0 in the recipe"),
    ({"target_modules": ["q_proj"]}, "is adapted in the folder but not in the recipe"),
    ({"modules_to_save": ["lm_head"]}, "lm_head is fully trained in the recipe but not in the folder"),
]


@pytest.mark.parametrize(("changes", "said"), OTHER)
def test_plan_refuses_the_folder_of_a_different_adapter(
    base: Path, supervised: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    recipe = write_recipe(tmp_path, base, adapter={**continued(supervised), **changes})
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    assert any(said in refusal.message for refusal in plan.refusals)


@pytest.mark.drawn
def test_unpaired_preferences_and_samples_compare_with_it_too(base: Path, supervised: Path, tmp_path: Path) -> None:
    adapter = continued(supervised)
    kto = train(write_kto(tmp_path / "kto", base, adapter=adapter))
    assert losses(kto)[0] == pytest.approx(0.5, abs=1e-5)
    grpo = train(write_prompts(tmp_path / "grpo", base, adapter=adapter, objective={"beta": 0.1}))
    steps = [record for record in records(grpo) if "kl" in record]
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["kl"] > 1e-6


def test_plan_counts_the_frozen_copy(base: Path, supervised: Path, tmp_path: Path) -> None:
    adapter = continued(supervised)
    fresh, _ = make_plan(load_recipe(write_recipe(tmp_path / "fresh", base, adapter={"r": adapter["r"]})), device=CPU)
    plan, _ = make_plan(load_recipe(write_recipe(tmp_path / "continued", base, adapter=adapter)), device=CPU)
    copied = 4 * plan.trainable_parameters
    assert plan.peak_bytes.adapter - fresh.peak_bytes.adapter == pytest.approx(copied, rel=0.05)
    assert any("reference model is the base with the adapter at step 0" in note for note in plan.notes)


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one(base: Path, supervised: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one", base, data={"eval": None}, adapter=continued(supervised))
    one = losses(train(recipe))
    two = run_two(TORCHRUN, recipe, tmp_path / "two")
    assert two.returncode == 0, two.stdout + two.stderr
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-5)


@pytest.mark.drawn
def test_eval_compares_with_it_or_refuses(base: Path, supervised: Path, tmp_path: Path) -> None:
    training = {"eval_steps": 6, "save_steps": 6}
    run = train(write_recipe(tmp_path, base, adapter=continued(supervised), training=training))
    evaluations = [record["eval"] for record in records(run) if "eval" in record]
    assert measured(run)["loss"] == pytest.approx(evaluations[-1]["loss"], rel=1e-5)
    assert measured(Path(f"{run}@6"))["loss"] == pytest.approx(evaluations[-1]["loss"], rel=1e-5)
    shutil.copytree(run / "adapter", tmp_path / "copied")
    with pytest.raises(InputError, match="compares this adapter with its state at step 0"):
        measured(tmp_path / "copied", f"data.eval=[{tmp_path / 'train.jsonl'}]")


@pytest.mark.drawn
def test_room_on_the_disk_is_asked_for_the_copy_too(
    base: Path, supervised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("tunekit.artifacts.run.RunFolder.require_free_bytes", lambda self, count: asked.append(count))
    for name, adapter in (("fresh", {"r": continued(supervised)["r"]}), ("continued", continued(supervised))):
        train(write_recipe(tmp_path / name, base, adapter=adapter, training={"keep_checkpoints": 2, "epochs": 1}))
    fresh, with_copy = asked[0], asked[-1]
    assert with_copy * (3 * 3 + 1) == fresh * (4 * 3 + 1), "a copy in each of three checkpoints"


@pytest.mark.parametrize(
    ("objective", "row", "way"),
    [
        ({"method": "dpo"}, {"prompt": "a", "chosen": "b", "rejected": "c"}, "such as orpo or simpo"),
        ({"method": "kto"}, {"prompt": "a", "completion": "b", "label": True}, "pairs of answers with an objective"),
        ({"method": "grpo", "beta": 0.1, "reward": {"regex": "a"}, **SHORT}, {"prompt": "a"}, r"objective\.beta: 0"),
        ({"method": "rloo", "beta": 0, "reward": {"regex": "a"}, **SHORT}, {"prompt": "a"}, None),
    ],
)
def test_full_tuning_with_a_reference_names_its_memory_and_another_way(
    tiny_llama: Path, tmp_path: Path, objective: dict[str, Any], row: dict[str, Any], way: str | None
) -> None:
    rows = [{**row, "prompt": f"a {number}"} for number in range(8)]
    recipe = write_recipe(tmp_path, tiny_llama, rows, objective=objective, data={"eval": None})
    values = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**values, "adapter": {"method": "full"}}))
    plan = make_plan(load_recipe(recipe))[0]
    assert not plan.refusals
    found = [note for note in plan.notes if "the run stores a copy of the trained weights in float32" in note]
    assert len(found) == (way is not None)
    assert way is None or re.search(way, found[0])


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 1e-3)])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_full_tuning_compares_with_the_base_at_step_0(
    tiny_llama: Path, tmp_path: Path, method: str, dtype: str, close: float
) -> None:
    """Rewards are beta times the change of the log-probabilities since the evaluation before step 1. Also after the
    first steps of the first epoch, whose rows have no cached reference."""
    write = write_recipe if method == "dpo" else write_kto
    recipe = write(tmp_path, tiny_llama, model={"dtype": dtype}, training={"learning_rate": 1e-3})
    values = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**values, "adapter": {"method": "full"}}))
    run = train(recipe)
    first, *_, last = [record["eval"] for record in records(run) if "eval" in record]
    assert first["rewards_chosen"] == 0.0
    for name in ("chosen", "rejected"):
        change = last[f"logps_{name}"] - first[f"logps_{name}"]
        assert change != 0.0
        assert last[f"rewards_{name}"] == pytest.approx(0.1 * change, abs=close * abs(first[f"logps_{name}"]))
    assert abs(losses(run)[2] - losses(run)[0]) > 1e-4
    with pytest.raises(InputError, match=rf"{method} compares this model with the base at step 0, .*; read the eval"):
        load_reference(load_target(find_target(str(run), None, []), CPU))
