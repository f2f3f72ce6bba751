"""AdaLoRA through the real loop and through recipes: ranks come down to the target, and a resume changes no bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.loop_case import Case, make_case, make_rows
from tests.support.plans import make_plan
from tests.support.train_case import result_bytes, train_in_child, write_recipe
from tunekit.adapters.folder.read import load_into
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.adapters.methods.adalora import RankBudget
from tunekit.errors import RecipeError
from tunekit.recipe.adapters.adalora import AdaloraSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.training import TrainingSection

NAMES = ("q_proj", "v_proj", "down_proj")
ADAPTER = {"method": "adalora", "init_r": 4, "target_r": 2, "alpha": 8.0, "target_modules": list(NAMES)}


def start(folder: Path, rate: float = 0.05, checkpointed: int = 0, steps: int = 6, **changes: Any) -> Case:
    section = TrainingSection(
        learning_rate=rate, scheduler="constant", warmup_ratio=None, epochs=None, max_steps=steps, micro_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    settings = AdaloraSettings(**{**ADAPTER, "target_modules": NAMES, "tinit": 1, "tfinal": 2, **changes})
    return make_case(folder, make_rows(8), training=section, adapter=settings, checkpointed=checkpointed)


def run(case: Case) -> dict[str, Tensor]:
    case.run()
    return {name: tensor.clone() for name, tensor in case.adapter.state().items()}


def ranks(case: Case) -> int:
    return sum(int((layer.E != 0).sum()) for layer in case.adapter.layers.values())


def test_it_learns_and_ends_at_the_target(tiny_llama: Path) -> None:
    still, trained = start(tiny_llama, 0.0), start(tiny_llama)
    before = {name: tensor.clone() for name, tensor in trained.adapter.trained().items()}
    run(still)
    after = run(trained)
    assert trained.losses[-1] < still.losses[-1] - 0.01
    gone = {f"{layer.module_name}.lora_E" for layer in trained.adapter.layers.values() if not layer.kept.any()}
    assert {name for name in before if torch.equal(before[name], after[name])} == gone
    assert len(gone) < len(trained.adapter.layers) / 2
    assert ranks(trained) == 2 * len(trained.adapter.layers)
    again = run(start(tiny_llama, checkpointed=2))
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resume_changes_no_bit(tiny_llama: Path, stop: int) -> None:
    whole, first, second = (start(tiny_llama) for _ in range(3))
    expected = run(whole)
    second.run_after_a_stop(first, stop)
    assert first.losses + second.losses == whole.losses
    assert all(torch.equal(second.adapter.state()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("tfinal", "interval"), [(0, 1), (0, 4), (3, 4)])
def test_the_last_steps_always_hold_the_target(tiny_llama: Path, tfinal: int, interval: int) -> None:
    case = start(tiny_llama, tinit=0, tfinal=tfinal, deltaT=interval)
    run(case)
    assert ranks(case) == 2 * len(case.adapter.layers)


def test_a_skipped_allocation_is_made_up_for(tiny_llama: Path) -> None:
    """Float16 skips steps that overflow, and the one of the last allocation may be among them."""
    case = start(tiny_llama)
    hook = case.adapter.after_step
    case.adapter.after_step = lambda step, total: None if step == 4 else hook(step, total)  # type: ignore[method-assign]
    run(case)
    assert ranks(case) == 2 * len(case.adapter.layers)


def test_a_trained_folder_is_continued(tiny_llama: Path, tmp_path: Path) -> None:
    """The removed ranks come back with E = 0, and the new run moves and removes ranks as any other."""
    first, second = start(tiny_llama), start(tiny_llama)
    run(first)
    names = {"base_name": str(tiny_llama), "base_fingerprint": None, "revision": None}
    save_adapter_folder(first.adapter, tmp_path / "adapter", **names)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = first.model.base.net(input_ids=ids).logits
        load_into(second.adapter, tmp_path / "adapter")
        torch.testing.assert_close(second.model.base.net(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert ranks(second) == 2 * len(second.adapter.layers)
    assert all(layer.kept.all() and layer.A.norm(dim=1).all() for layer in second.adapter.layers.values())
    before = {name: tensor.clone() for name, tensor in second.adapter.trained().items()}
    after = run(second)
    assert ranks(second) == 2 * len(second.adapter.layers)
    gone = {name.replace("lora_E", "lora_A"): (each[:, 0] == 0) for name, each in before.items() if "lora_E" in name}
    assert any(not torch.equal(before[name][rows], after[name][rows]) for name, rows in gone.items())
    recipe = make_recipe(tmp_path, tiny_llama, init_from=str(tmp_path / "adapter"))
    plan, _ = make_plan(load_recipe(str(recipe), []))
    assert plan.refusals == []


def make_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    recipe = write_recipe(folder, model)
    values = json.loads(recipe.read_text())
    values["adapter"] = {**ADAPTER, **changes}
    recipe.write_text(json.dumps(values))
    return recipe


@pytest.mark.drawn
def test_a_run_from_a_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_llama, dropout=0.1)
    assert train_in_child(recipe, tmp_path / "whole").code == 0
    config = json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_text())
    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert config["total_step"] == plan["steps"]
    assert sum(map(sum, config["rank_pattern"].values())) == 2 * len(plan["targets"])
    stopped = train_in_child(recipe, tmp_path / "again", before=stop_after_two_steps)
    assert stopped.code == 143, stopped.output
    assert train_in_child(recipe, tmp_path / "again", resume=True).code == 0
    assert result_bytes(tmp_path / "again") == result_bytes(tmp_path / "whole")


def stop_after_two_steps() -> None:
    """The child asks itself to stop, as a scheduler would."""
    hook = RankBudget.after_step

    def stopping(self: RankBudget, step: int, total_steps: int) -> None:
        hook(self, step, total_steps)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    RankBudget.after_step = stopping  # type: ignore[method-assign]


def test_plan_refuses_a_schedule_without_a_step_to_move_ranks_in(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_llama, tinit=4, tfinal=3)
    plan, _ = make_plan(load_recipe(str(recipe), ["~training.epochs", "training.max_steps=7"]))
    assert [refusal.key for refusal in plan.refusals] == ["adapter.tinit"]
    assert "leave no step of this run's 7" in plan.refusals[0].message
    plan, _ = make_plan(load_recipe(str(recipe), ["~training.epochs", "training.max_steps=8"]))
    assert plan.refusals == []


def test_a_target_that_leaves_nothing_to_move_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_llama, target_r=4)
    with pytest.raises(RecipeError, match="target_r 4 is not below init_r 4"):
        make_plan(load_recipe(str(recipe), []))
