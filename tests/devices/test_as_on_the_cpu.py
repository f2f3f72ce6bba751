"""Whole runs on the simulated device and on the CPU by the same kernels: the same losses, the same adapter; and after a
kill what an uninterrupted run gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.architectures.tiny import write_tiny
from tests.devices.test_mistakes import CUDA
from tests.devices.test_runs import train, whole_device
from tests.support.loop_case import make_case, make_rows
from tests.support.train_case import lose_the_end, records, result_bytes, without_times
from tests.training.test_loop import training
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.load import load_recipe
from tunekit.train import train_verb

__all__ = ["whole_device"]
SAME_KERNELS = "model.attention=eager"  # torch has others for a GPU than for a CPU, and so has tunekit
OF_A_GPU = "memory."  # keys that the CPU's run has not: everything is resident there
TENSORS = "adapter_model.safetensors"
PAGED = "adapter.r=32"  # bitsandbytes pages 100,000 numbers and more

RUNS: dict[str, tuple[str, ...]] = {
    "resident": (),
    "host": ("memory.streaming=host",),
    "disk": ("memory.streaming=disk",),
    "offload": ("memory.gradient_checkpointing=true", "memory.activation_offload=true"),
    "nf4": ("model.quantization=nf4",),
    "nf4, host": ("model.quantization=nf4", "memory.streaming=host"),
    "int8": ("model.quantization=int8",),
    "int8_weight_only, disk": ("model.quantization=int8_weight_only", "memory.streaming=disk"),
    "packed": ("data.packing=true",),
    "packed, host": ("data.packing=true", "memory.streaming=host"),
    "adamw_8bit": ("training.optimizer=adamw_8bit", PAGED),
    "paged_adamw": ("training.optimizer=paged_adamw", PAGED),
    "paged_adamw_8bit, host": ("training.optimizer=paged_adamw_8bit", PAGED, "memory.streaming=host"),
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_adapter_are_those_of_the_cpu_and_of_a_resumed_run(folder: Path, tmp_path: Path, name: str) -> None:
    overrides = (SAME_KERNELS, *RUNS[name])
    own, _ = train(tmp_path / "own", folder, *overrides, device="cuda")
    of_cpu = [each for each in overrides if not each.startswith(OF_A_GPU)]
    reference, _ = train(tmp_path / "cpu", folder, *of_cpu, device="cpu")
    losses = [[record["loss"] for record in records(run) if "loss" in record] for run in (own, reference)]
    if "8bit" in name:  # moments are rounded to other neighbours than on a CPU
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    else:
        assert without_times(records(own)) == without_times(records(reference))
        assert result_bytes(own)[TENSORS] == result_bytes(reference)[TENSORS]
    before = without_times(records(own)), result_bytes(own)
    lose_the_end(own)
    os.environ["TUNEKIT_DEVICE"] = "cuda"
    train_verb(load_recipe(own.parent / "recipe.yaml", [f"output.dir={own}", *overrides]), True, False)
    assert (without_times(records(own)), result_bytes(own)) == before


def test_buffers_that_no_file_contains_are_streamed_too(tmp_path: Path) -> None:
    """Such as the masks of GPT-Neo's layers: they stay on the host, from which the thread copies a layer."""
    folder, overrides = write_tiny("gpt_neo", tmp_path / "base"), (SAME_KERNELS, "adapter.target_modules=all-linear")
    own, _ = train(tmp_path / "own", folder, *overrides, "memory.streaming=disk", device="cuda")
    reference, _ = train(tmp_path / "cpu", folder, *overrides, device="cpu")
    losses = [[record["loss"] for record in records(run) if "loss" in record] for run in (own, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_states_of_a_paged_optimizer_are_paged(folder: Path) -> None:
    settings = training(max_steps=1, optimizer="paged_adamw_8bit")
    case = make_case(folder, make_rows(3), training=settings, device=CUDA, adapter=LoraSettings(r=32))
    case.run()
    (flat,) = case.optimizer.groups
    state = case.optimizer.native.state[flat.data]
    assert [state[name].is_paged for name in ("state1", "state2")] == [True, True]
    assert state["state1"].dtype == torch.uint8
    assert not case.optimizer.gated
