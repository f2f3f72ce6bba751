"""`memory.activation_offload` and `memory.mlp_tile_tokens` through whole runs, plans and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.model.test_families import MODELS, SHAPE
from tests.support.plans import make_plan
from tests.support.train_case import records, result_bytes, train_in_child, without_times, write_recipe
from tunekit.errors import ModelError
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.supported import refuse_unsupported

CPU = torch.device("cpu")
RECOMPUTED = "memory.gradient_checkpointing=true"


@pytest.mark.drawn
def test_a_run_whose_inputs_wait_is_the_same_run(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", tiny_llama, rows=12)
    for name, overrides in (("plain", ()), ("waiting", (RECOMPUTED, "memory.activation_offload=true"))):
        ended = train_in_child(recipe, tmp_path / name, *overrides)
        assert ended.code == 0, ended.output
    assert result_bytes(tmp_path / "waiting") == result_bytes(tmp_path / "plain")
    assert without_times(records(tmp_path / "waiting")) == without_times(records(tmp_path / "plain"))
    assert "host and device share one memory" in " ".join(ended.output.split())


@pytest.mark.drawn
def test_a_run_in_tiles_follows_the_plain_one(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", tiny_llama, rows=12)
    for name, tokens in (("plain", "null"), ("tiled", "16")):
        ended = train_in_child(recipe, tmp_path / name, f"memory.mlp_tile_tokens={tokens}", "adapter.dropout=0")
        assert ended.code == 0, ended.output
    assert "MLPs and norms compute 16 tokens at a time" in ended.output
    plain, tiled = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "tiled"))
    assert any(not torch.equal(plain[name], tiled[name]) for name in plain), "tiles were made"
    losses = [[record["loss"] for record in records(tmp_path / run) if "loss" in record] for run in ("plain", "tiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_cannot_be_obeyed_is_refused_with_its_key(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", tiny_llama)
    for overrides, key in (
        (["memory.activation_offload=true", "memory.gradient_checkpointing=false"], "memory.activation_offload"),
        (["memory.activation_offload=true", "memory.gradient_checkpointing=1"], "memory.activation_offload"),
        (["memory.mlp_tile_tokens=64", "model.quantization=int8"], "memory.mlp_tile_tokens"),
    ):
        assert [problem.key for problem in refuse_unsupported(load_recipe(recipe, overrides).recipe)] == [key]
    for overrides in (["memory.activation_offload=true"], ["memory.activation_offload=true", RECOMPUTED]):
        assert refuse_unsupported(load_recipe(recipe, overrides).recipe) == []


def test_a_model_without_an_mlp_of_its_own_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = tmp_path / "opt"
    AutoConfig.for_model("opt", **{**SHAPE, **MODELS["opt"], "vocab_size": 264}).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    recipe = write_recipe(tmp_path / "recipe", folder)
    with pytest.raises(ModelError, match="has no MLP") as caught:
        make_plan(load_recipe(recipe, ["memory.mlp_tile_tokens=64", "data.max_length=60"]), device=CPU)
    assert caught.value.problems[0].key == "memory.mlp_tile_tokens"
    assert caught.value.exit_code == 2


def test_plan_says_when_nothing_waits(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", tiny_llama)
    plan, _ = make_plan(load_recipe(recipe, ["memory.activation_offload=true"]), device=CPU)
    assert plan.choice.checkpointed_layers == 0
    assert any("no inputs of layers are offloaded" in note for note in plan.notes)
    plan, _ = make_plan(load_recipe(recipe, []), device=CPU)
    assert not [note for note in plan.notes if "wait" in note or "MLPs" in note]
