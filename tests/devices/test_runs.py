"""Whole runs on the simulated device, of any kind: a budget, streamed bases, float16 that overflows; and what follows
a run."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices import simulated
from tests.support.loop_case import DEVICE
from tests.support.train_case import records, result_bytes, without_times, write_recipe
from tunekit import sweep
from tunekit.errors import RecipeError, ResourceError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import generate_verb
from tunekit.machine.memory import limit_bytes
from tunekit.merge import merge_verb
from tunekit.recipe.load import load_recipe
from tunekit.train import train_verb
from tunekit.training.state import LossScale

MIB = 2**20
METAL = DEVICE.type == "mps"


@pytest.fixture(autouse=True)
def whole_device() -> Iterator[None]:
    """A budget bounds a process, and a device is chosen for one; here others come before it and after it."""
    gc.collect()
    torch.get_device_module(DEVICE).empty_cache()
    yield
    os.environ.pop("TUNEKIT_DEVICE", None)
    limit_bytes(DEVICE, simulated.DOUBLE.properties.total_memory)


def train(
    place: Path, folder: Path, *overrides: str, device: str | None = None, **sections: Any
) -> tuple[Path, dict[str, Any]]:
    """The run's folder and its report."""
    place.mkdir(exist_ok=True)
    if device is not None:
        os.environ["TUNEKIT_DEVICE"] = device
    train_verb(
        load_recipe(write_recipe(place, folder, rows=11, **sections), [f"output.dir={place / 'run'}", *overrides]),
        False,
        False,
    )
    return place / "run", json.loads((place / "run" / "report.json").read_text())


@pytest.mark.skipif(METAL, reason="Metal shares the memory of the CPU")
@pytest.mark.usefixtures("resident")
def test_the_measured_model_of_a_sweep_takes_no_memory_from_its_trials(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    module, allocated = torch.get_device_module(DEVICE), list[int]()
    before = module.memory_allocated()

    def plan_lanes(*_: object) -> None:
        allocated.append(module.memory_allocated())
        raise RecipeError("planned", "go on")

    monkeypatch.setattr(sweep, "_plan_lanes", plan_lanes)
    recipe = write_recipe(tmp_path, folder, rows=11)
    with pytest.raises(RecipeError, match="planned"):
        sweep.automatic_verb(load_recipe(recipe), str(recipe), [], 1000.0, False, None)
    assert allocated == [before]


@pytest.fixture(scope="module")
def resident(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("resident"), folder)[0]


def test_a_budget_bounds_the_allocator(folder: Path, tmp_path: Path) -> None:
    run, report = train(tmp_path, folder, "memory.budget=64MiB")
    assert json.loads((run / "plan.json").read_text())["device"] == str(DEVICE)
    if METAL:  # memory that the host has too: no limit, and no peak but what its driver took
        assert 0 < report["peak_reserved_bytes"] == report["measured_bytes"]["mps"]
        assert "peak_allocated_bytes" not in report
        return
    assert simulated.DOUBLE.fractions[0] == 64 * MIB / simulated.DOUBLE.properties.total_memory
    peaks = [report[f"peak_{kind}_bytes"] for kind in ("requested", "allocated", "reserved")]
    assert 0 < peaks[0] < peaks[1] <= peaks[2] < 64 * MIB
    assert report["measured_bytes"] == {DEVICE.type: peaks[1]}


def test_a_budget_that_is_too_small_is_a_resource_that_ran_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the smallest setting of this run needs"):
        train(tmp_path, folder, "memory.budget=1MiB")


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_streamed_base_trains_the_same_adapter(folder: Path, tmp_path: Path, tier: str, resident: Path) -> None:
    if METAL and tier == "host":
        with pytest.raises(TunekitError, match="mps shares the host's memory"):
            train(tmp_path, folder, f"memory.streaming={tier}")
        return
    run, _ = train(tmp_path, folder, f"memory.streaming={tier}")
    assert without_times(records(run)) == without_times(records(resident))
    tensors = "adapter_model.safetensors"
    assert result_bytes(run)[tensors] == result_bytes(resident)[tensors]


@pytest.mark.parametrize("layers", ["streamed", "off"])
def test_a_streamed_output_projection_trains_alike(
    folder: Path, tmp_path: Path, layers: str, resident: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not bit for bit: sums over the vocabulary are taken part by part."""
    monkeypatch.setattr("tunekit.memory.vocabulary.PART_BYTES", 64 * 64 * 4)
    tier = "off" if layers == "off" else "disk" if METAL else "host"
    run, _ = train(tmp_path, folder, f"memory.streaming={tier}", "memory.streamed_head=true")
    losses = [[each["loss"] for each in records(place) if "loss" in each] for place in (run, resident)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_steps_that_overflow_are_skipped_recorded_and_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tunekit.training.begin.LossScale", lambda enabled: LossScale(enabled, 2.0**18))
    run, report = train(tmp_path, folder, "training.epochs=4", model={"dtype": "float16"})
    steps = [record for record in records(run) if "loss" in record]
    skipped = sum(record["grad_norm"] is None for record in steps)
    assert 0 < skipped < len(steps)
    assert report["skipped_steps"] == skipped
    told = f"{skipped} steps changed no weight: their gradients overflowed in float16"
    assert told in (run / "report.md").read_text()
    assert told in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_result_is_evaluated_generates_and_is_merged(
    folder: Path, resident: Path, tmp_path: Path, quantization: str
) -> None:
    if quantization != "none":
        resident, _ = train(tmp_path, folder, f"model.quantization={quantization}")
    evaluate_verb(str(resident), None, None, None, [], str(tmp_path / "eval.json"), [])
    last = [record["eval"]["loss"] for record in records(resident) if "eval" in record][-1]
    assert json.loads((tmp_path / "eval.json").read_text())["loss"] == pytest.approx(last, rel=1e-5)
    generate_verb(str(resident), None, ["say 3"], None, [], max_new_tokens=4)
    merge_verb(str(resident / "adapter"), str(tmp_path / "merged"), None, None, [])
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("training.optimizer=adamw_8bit", "computed by bitsandbytes, which has no kernels for mps"),
        ("model.quantization=int8", "which has no kernels for mps"),
        ("model.quantization=fp8", "this device has no float8 products"),
        ("training.kernels=liger", "liger-kernel's kernels run on a GPU only"),
    ],
)
@pytest.mark.skipif(not METAL, reason="what Metal lacks")
def test_what_the_device_lacks_is_refused_by_name(folder: Path, tmp_path: Path, override: str, refused: str) -> None:
    with pytest.raises(TunekitError, match=refused):
        train(tmp_path, folder, override)


@pytest.mark.parametrize("quantization", ["nf4", "int8_weight_only"])
def test_a_packed_base_trains_as_it_does_on_the_cpu(folder: Path, tmp_path: Path, quantization: str) -> None:
    """By bitsandbytes' kernels, or our own codec where the device has none of them."""
    losses = []
    for name in (DEVICE.type, "cpu"):
        run, _ = train(tmp_path / name, folder, f"model.quantization={quantization}", device=name)
        losses.append([record["loss"] for record in records(run) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
