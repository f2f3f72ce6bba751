"""Every start through `tunekit train`: it learns, a resume is exact and looks at nothing again, the folder is enough.

Runs are forked children; the recipe's `adapter:` section is all that differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.plans import make_plan
from tests.support.train_case import (
    in_child,
    kill_self,
    losses,
    records,
    result_bytes,
    train_in_child,
    without_times,
    write_recipe,
)
from tests.training.test_ranks import TORCHRUN, run_two
from tunekit.adapters.folder.read import read_adapter_config
from tunekit.arithmetic.merge import merge
from tunekit.errors import RecipeError
from tunekit.model.quantized import codec
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target

STARTS: dict[str, tuple[Any, dict[str, Any]]] = {  # case: start, the model section
    "pissa": ("pissa", {}),
    "pissa-fast": ({"method": "pissa", "iterations": 4}, {}),
    "olora": ("olora", {}),
    "loftq-nf4": ("loftq", {"quantization": "nf4"}),
    "loftq-int8": ("loftq", {"quantization": "int8_weight_only"}),
    "eva": ({"method": "eva", "batches": 3}, {}),
    "eva-ranks": ({"method": "eva", "batches": 3, "rho": 2}, {}),
    "eva-nf4": ({"method": "eva", "batches": 2}, {"quantization": "nf4"}),
    "corda": ({"method": "corda", "batches": 4}, {}),
    "lora_ga": ({"method": "lora_ga", "batches": 3}, {}),
}
CALIBRATED = {"eva": 3, "eva-ranks": 3, "eva-nf4": 2, "corda": 4, "lora_ga": 3}  # micro-batches looked at
MOVING = {"pissa", "pissa-fast", "olora", "corda", "lora_ga"}


def recipe_of(folder: Path, model: Path, case: str, **training: Any) -> Path:
    """Four steps over one set of eight rows, so that losses of steps can be compared."""
    start, section = STARTS[case]
    path = write_recipe(
        folder,
        model,
        rows=8,
        data={"eval": None},
        adapter={"r": 4, "alpha": 8, "dropout": 0.0, "start": start},
        training={
            "learning_rate": 0.003,
            "scheduler": "constant",
            "warmup_steps": 0,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "epochs": None,
            "max_steps": 4,
            "save_steps": 2,
            "keep_checkpoints": 3,
            **training,
        },
    )
    values = json.loads(path.read_text())
    values["model"] |= section
    path.write_text(json.dumps(values))
    return path


def kill_after(step: int) -> Callable[[], None]:
    """A child that is gone once the checkpoint of `step` is written."""

    def patch() -> None:
        from tunekit.training.run import Run

        save = Run._save

        def save_and_die(run: Any) -> None:
            save(run)
            if run.state.step == step:
                kill_self()

        Run._save = save_and_die

    return patch


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", STARTS)
def test_training_and_resume(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    if "nf4" in case and not codec.has_bitsandbytes():
        pytest.skip("bitsandbytes is not installed")  # importorskip would import it, and its import compiles
    recipe = recipe_of(tmp_path, tiny_llama, case)
    whole = train_in_child(recipe, tmp_path / "whole")
    assert whole.code == 0, whole.output
    found = losses(tmp_path / "whole")  # every step sees all rows: the first loss is that of learning rate 0
    assert found[-1] < found[0] - 0.01
    _check_cost(case, whole.output, tmp_path / "whole")
    cut = train_in_child(recipe, tmp_path / "cut", before=kill_after(2))
    assert cut.code < 0, cut.output
    resumed = train_in_child(recipe, tmp_path / "cut", resume=True)
    assert resumed.code == 0, resumed.output
    assert "looked at" not in resumed.output
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "whole")
    assert without_times(records(tmp_path / "cut")) == without_times(records(tmp_path / "whole"))
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("whole", "cut")]
    assert plans[0]["targets"] == plans[1]["targets"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", ["pissa", "lora_ga", "eva"])
def test_checkpointed_layers_change_nothing(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_llama, case, max_steps=2)
    for name, layers in (("plain", "false"), ("checkpointed", "true")):
        ended = train_in_child(recipe, tmp_path / name, f"memory.gradient_checkpointing={layers}")
        assert ended.code == 0, ended.output
    plain, checkpointed = result_bytes(tmp_path / "plain"), result_bytes(tmp_path / "checkpointed")
    assert plain["adapter_model.safetensors"] == checkpointed["adapter_model.safetensors"]


def _check_cost(case: str, output: str, run: Path) -> None:
    """What the pass took is printed and reported; no other start makes one."""
    report = json.loads((run / "report.json").read_text())
    if case not in CALIBRATED:
        assert "calibration" not in report
        assert "calibrate" not in report["seconds"]
        return
    count, backward = CALIBRATED[case], CALIBRATED[case] if case == "lora_ga" else 0
    facts = report["calibration"]
    assert (facts["micro_batches"], facts["forward_passes"], facts["backward_passes"]) == (count, count, backward)
    assert report["seconds"]["calibrate"] >= facts["seconds"] > 0
    words = f"looked at {count} micro-batches ({facts['tokens']} tokens) before step 1: {count} forward"
    assert words in output
    assert words.replace("(", "").split(" tokens")[0].split()[-1] in (run / "report.md").read_text()
    trained = sum(target["trainable_parameters"] for target in json.loads((run / "plan.json").read_text())["targets"])
    assert report["trainable_parameters"] == trained


@pytest.mark.slow
@pytest.mark.parametrize("case", ["eva-ranks", "lora_ga"])
def test_two_processes_start_as_one(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_llama, case)
    one, two = train_in_child(recipe, tmp_path / "one"), run_two(TORCHRUN, recipe, tmp_path / "two")
    assert (one.code, two.returncode) == (0, 0), one.output + two.stderr
    assert two.stdout.count("looked at") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("one", "two")]
    assert plans[0]["targets"] == plans[1]["targets"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "case",
    ["eva-ranks", "loftq-nf4", *(pytest.param(case, marks=pytest.mark.slow) for case in ("pissa", "lora_ga"))],
)
def test_the_folder_alone_is_enough(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    """eval, generate and merge see plain LoRA; peft computes the same logits on a dense base."""
    if "nf4" in case and not codec.has_bitsandbytes():
        pytest.skip("bitsandbytes is not installed")  # importorskip would import it, and its import compiles
    recipe = recipe_of(tmp_path, tiny_llama, case)
    assert train_in_child(recipe, tmp_path / "run").code == 0
    folder = tmp_path / "run" / "adapter"
    config = read_adapter_config(folder)
    assert config.settings.r == (8 if case in MOVING else 4)
    rows = str(tmp_path / "train.jsonl")

    def work() -> None:
        from tunekit.evaluate import evaluate_verb
        from tunekit.generate import generate_verb

        evaluate_verb(str(folder), None, rows, None, (), str(tmp_path / "eval.json"), ())
        generate_verb(str(folder), None, ["say 1"], None, ("evaluation.max_new_tokens=4",))

    ended = in_child(work, tmp_path / "verbs.log")
    assert ended.code == 0, ended.output
    values = json.loads((tmp_path / "eval.json").read_text())
    assert values["loss"] < losses(tmp_path / "run")[0]
    merged = merge(find_target(str(folder), None, ()), tmp_path / "merged")
    assert merged.difference.largest < 1e-4
    if case == "loftq-nf4":
        return
    ids = torch.arange(3, 40)[None]
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(tiny_llama), dtype=torch.float32), str(folder)
    )
    running = load_target(find_target(str(folder), None, ()), torch.device("cpu")).model
    with torch.no_grad():
        expected = running.base.net(input_ids=ids).logits
        torch.testing.assert_close(theirs.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [case for case in STARTS if case.startswith(("eva", "lora_ga", "pissa", "corda"))])
def test_plan_counts_what_a_start_keeps(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_llama, case)
    plain, _ = make_plan(load_recipe(recipe, ["adapter.start=default"]))
    plan, _ = make_plan(load_recipe(recipe))
    assert not plan.refusals
    moved = 4 * sum(4 * (target.in_features + target.out_features) for target in plan.targets)
    assert plan.peak_bytes.adapter - plain.peak_bytes.adapter == (moved if case in MOVING else 0)


def test_a_start_cannot_look_at_the_head(tiny_llama: Path, tmp_path: Path) -> None:
    """Its input never passes through the layer while the base is looked at: the loss is taken in chunks."""
    recipe = recipe_of(tmp_path, tiny_llama, "eva")
    plan, _ = make_plan(load_recipe(recipe, ["adapter.target_modules=[q_proj, lm_head]"]))
    assert [refusal.key for refusal in plan.refusals] == ["adapter.start"]
    assert "lm_head" in plan.refusals[0].message


@pytest.mark.parametrize("method", ["lora", "dora", "lora_fa"])
def test_ranks_that_do_not_fit_are_refused(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_llama, "lora_ga")
    with pytest.raises(RecipeError, match="lora_ga needs 2 r singular vectors"):
        make_plan(load_recipe(recipe, [f"adapter.method={method}", "adapter.r=24"]))
    with pytest.raises(RecipeError, match="pissa divides by the scaling"):
        make_plan(load_recipe(recipe, [f"adapter.method={method}", "adapter.start=pissa", "adapter.alpha=0"]))
