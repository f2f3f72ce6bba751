"""The router loss of a mixture of experts, and its gradient, are those that transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architectures.cells import call
from tests.architectures.tiny import write_tiny
from tests.support.loop_case import Case, make_case, make_rows
from tests.support.ranks_case import train_in_ranks
from tests.support.train_case import write_recipe
from tunekit.contracts import Batch
from tunekit.data.batching.pad import real_positions
from tunekit.errors import RecipeError
from tunekit.model.router_loss import ROUTER_LOSS
from tunekit.recipe.load import load_recipe
from tunekit.recipe.training import TrainingSection

WEIGHT, ROWS = 0.5, 6
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
RUNS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "max_length": 128},
    "recomputed": {"checkpointed": 2},
    "streamed": {"streaming": {"pass_size": 2}},
    "streamed one by one": {"streaming": {"pass_size": 1}, "checkpointed": 1},
}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "olmoe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp(request.param))


def case_of(folder: Path, *, size: int = 3, **settings: Any) -> Case:
    training = TrainingSection(max_steps=1, epochs=None, micro_batch_size=size, gradient_accumulation_steps=2)
    case = make_case(folder, make_rows(ROWS), training=training, **settings)
    case.model.set_router_loss(WEIGHT)
    with torch.no_grad():
        for number, tensor in enumerate(case.adapter.trained().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)) / 8)
    return case


def gradients(case: Case) -> dict[str, Tensor]:
    found = {name: tensor.grad.clone() for name, tensor in case.adapter.trained().items() if tensor.grad is not None}
    assert found
    return found


def of_transformers(case: Case, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """The router loss of the step, and the gradient of the whole loss, by the net's own forward."""
    case.optimizer.zero_gradients()
    supervised, router_loss = sum(batch.supervised for batch in batches), 0.0
    for batch in batches:
        ids, labels = batch.inputs["input_ids"], batch.targets["labels"]
        mask = real_positions(batch.lengths).long()
        output = case.model.base.net(ids, attention_mask=mask, labels=labels, output_router_logits=True)
        weight = case.model.base.net.router_aux_loss_coef
        entropy = output.loss - weight * output.aux_loss  # the mean of this micro-batch
        term = WEIGHT * output.aux_loss / len(batches)
        (entropy * batch.supervised / supervised + term).backward()
        router_loss += float(term.detach())
    return router_loss, gradients(case)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_has_the_router_loss_of_transformers(name: str, folder: Path) -> None:
    """Two micro-batches of different lengths; the router loss is the mean of theirs."""
    padded, case = case_of(folder), case_of(folder, **RUNS[name])
    [step] = padded.steps.after(0)
    expected, expected_gradients = of_transformers(padded, list(step.batches))
    [step] = case.steps.after(0)
    if name == "packed":
        padded = case_of(folder, size=ROWS)  # all rows are one micro-batch
        [whole] = padded.steps.after(0)
        expected, expected_gradients = of_transformers(padded, list(whole.batches))
    with case.model.training_mode(True):
        result = case.step(step, micro_batches=len(step.batches))
    ours = float(result.metrics[ROUTER_LOSS]) / sum(batch.supervised for batch in step.batches)
    assert ours == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradients(case), expected_gradients, **CLOSE)
    case.model.router_loss = None
    case.optimizer.zero_gradients()
    with case.model.training_mode(True):
        case.step(step)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(case), expected_gradients, **CLOSE)


def recipe_of(folder: Path, **keys: Any) -> Path:
    rows = [{"text": text} for text in ("sing of the wrath", "now", "the wrath of now sing", "of")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "data": {"train": [{"path": str(folder / "rows.jsonl"), "format": "text"}]},
        "training": {"max_steps": 2, "gradient_accumulation_steps": 2, "warmup_steps": 0},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe | keys), encoding="utf-8")
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("asks", "setting", "weight"),
    [(True, "auto", 0.25), (False, "auto", None), (True, "off", None), (False, 0.125, 0.125)],
)
def test_the_configuration_or_the_recipe_asks_for_it(
    asks: bool, setting: str | float, weight: float | None, tmp_path: Path
) -> None:
    """plan says which; each step logs the router loss apart from the loss."""
    recipe = recipe_of(write_tiny("mixtral", tmp_path))
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config |= {"output_router_logits": asks, "router_aux_loss_coef": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    said = call("plan", recipe, f"training.router_loss={setting}")
    note = "router loss: off" if weight is None else f"router loss: weight {weight:g}"
    assert note in " ".join(said.split())
    call("train", recipe, f"training.router_loss={setting}")
    logged = [record.get(ROUTER_LOSS) for record in records(tmp_path) if "loss" in record]
    if weight is None:
        assert logged == [None, None]
    else:
        assert all(0.9 * weight < value < 4 * weight for value in logged), logged  # weight * top_k if all is balanced


def test_dbrx_has_its_numbers_in_the_net_only(tmp_path: Path) -> None:
    recipe = recipe_of(write_tiny("dbrx", tmp_path))
    assert "router loss: weight 0.125" in " ".join(
        call("plan", recipe, "adapter.r=4", "training.router_loss=0.125").split()
    )
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["ffn_config"]["moe_loss_weight"] = 0.25
    (tmp_path / "config.json").write_text(json.dumps(config | {"output_router_logits": True}), encoding="utf-8")
    assert "router loss: weight 0.25" in " ".join(call("plan", recipe, "adapter.r=4").split())


def test_it_is_refused_where_no_router_has_it(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Exception, match=r"training.router_loss: llama has no routers .*; write router_loss: off"):
        call("train", recipe_of(tmp_path), "training.router_loss=0.1")


@pytest.mark.parametrize("value", ["-0.1", "on", "0", "nan"])
def test_other_values_are_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training.router_loss"):
        load_recipe(str(recipe_of(tmp_path)), [f"training.router_loss={value}"])


@pytest.mark.slow
def test_two_ranks_give_the_same_router_loss(tmp_path: Path) -> None:
    adapter = {"method": "lora", "r": 4, "dropout": 0.0}
    recipe = write_recipe(tmp_path, write_tiny("mixtral", tmp_path / "model"), rows=12, adapter=adapter)
    keys = ("training.epochs=null", "training.max_steps=2", "training.eval_steps=2", "training.router_loss=0.5")
    steps = []
    for world in (1, 2):
        run = tmp_path / f"run-{world}"
        ends = train_in_ranks(recipe, run, *keys, "training.gradient_accumulation_steps=4", world=world)
        assert [end.code for end in ends] == [0] * world, ends
        lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
        steps.append([(line["loss"], line[ROUTER_LOSS], line["grad_norm"]) for line in lines if "loss" in line])
    for one, two in zip(*steps, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
