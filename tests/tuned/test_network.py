"""The one assembly of a network: the run, its simulation and an evaluation get the same parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.data_case import objective_of
from tests.support.loop_case import make_rows
from tests.support.train_case import write_recipe
from tunekit.adapters.attach import attach_adapter
from tunekit.memory.tiling import Tiles
from tunekit.model.load import LoadedModel, load_model, make_meta_model
from tunekit.planning.simulation import SimulatedRun
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings
from tunekit.targets.target import find_target, load_target
from tunekit.tuned.network import prepare_network

CPU = torch.device("cpu")


def prepared(base: LoadedModel, choice: ExecutionSettings, **more: Any) -> nn.Module:
    attach = partial(attach_adapter, base.net, LoraSettings(r=4), seed=0, head_name="lm_head")
    return prepare_network(base, choice, attach, **more).base.net


def replaced_forwards(net: nn.Module) -> dict[str, str]:
    """What stands in the place of each module's own forward."""
    found = {name: module.__dict__.get("forward") for name, module in net.named_modules()}
    return {name: getattr(each, "__qualname__", type(each).__name__) for name, each in found.items() if each}


@pytest.mark.parametrize(
    "choice",
    [
        ExecutionSettings(),
        ExecutionSettings(checkpointed_layers=1),
        ExecutionSettings(mlp_tile_tokens=4),
        ExecutionSettings(kernels="liger"),
        ExecutionSettings(streaming="disk"),
        ExecutionSettings(checkpointed_layers=2, mlp_tile_tokens=4, kernels="liger", streaming="host"),
    ],
)
def test_a_simulated_network_is_put_together_like_the_real_one(tiny_llama: Path, choice: ExecutionSettings) -> None:
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32")
    real = prepared(load_model(section, device=CPU, streamed=choice.streaming != "off"), choice)
    simulated = prepared(make_meta_model(section, device=CPU), choice, planned_for=CPU)
    assert replaced_forwards(simulated) == replaced_forwards(real)
    assert {"model.layers.0", "model.layers.1", "model.layers.0.mlp"} <= replaced_forwards(real).keys()


def test_a_simulation_counts_other_kernels(tiny_llama: Path) -> None:
    """liger's norms keep their input and one number a row, whether or not liger-kernel is installed."""
    section = ModelSection(name_or_path=str(tiny_llama), dtype="bfloat16")
    meta = make_meta_model(section, device=CPU)
    run = SimulatedRun(meta, LoraSettings(r=4), objective_of(), TrainingSection(), ExecutionSettings(), CPU)
    small = ExecutionSettings(logits_chunk_tokens=64)  # so that the peak lies in the layers
    rows = make_rows(2, shortest=256, longest=256)
    batch = objective_of().rows.collate([[rows[0]], [rows[1]]])
    plain, liger = (
        replace(run, execution=choice).training_step(batch).peak["activations"]
        for choice in (small, replace(small, kernels="liger"))
    )
    assert liger < plain


def test_an_evaluation_computes_in_the_tiles_of_its_recipe(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, memory={"mlp_tile_tokens": 4})
    model = load_target(find_target(str(recipe), None, []), CPU).model
    tiles = [module for module in model.base.net.modules() if isinstance(module.__dict__.get("forward"), Tiles)]
    assert len(tiles) == 2 * 3, "an MLP and two norms in each of two layers"
