"""What the host waits for within a step, from the second step on, for each storage of the base and each method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices import simulated
from tests.devices.test_mistakes import CUDA, DISK, HOST, OFFLOAD, case_of
from tests.memory.test_streaming import WHOLE_MODEL, adapter
from tests.support.loop_case import Case, make_case, make_rows
from tests.training.test_loop import training
from tunekit.memory import vocabulary
from tunekit.memory.streaming import gather_on_host
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.training.engine import StepResult, StepWork


def waits_of(case: Case) -> Counter[str]:
    """What the host waited for after the first step, while steps were sent off; reading their numbers is not in it."""
    found = Counter[str]()

    def enter(step: int) -> None:
        simulated.DOUBLE.waits()
        torch.cuda.set_sync_debug_mode("warn" if step else "default")

    def leave() -> None:
        torch.cuda.set_sync_debug_mode("default")
        found.update(simulated.DOUBLE.waits())

    case.watch_steps(enter, leave)
    case.run()
    return found


def test_a_planted_wait_is_seen(folder: Path) -> None:
    """The other tests would also pass if nothing was watched."""
    case = case_of(folder)

    def waits(run: Callable[[], StepResult], work: StepWork) -> StepResult:
        case.optimizer.gradients()[0].sum().item()
        return run()

    case.around_steps(waits)
    assert waits_of(case) != {}


def section(folder: Path, dtype: str = "float32", quantization: str = "none") -> ModelSection:
    return ModelSection(name_or_path=str(folder), dtype=dtype, quantization=quantization)  # type: ignore[arg-type]


STORAGES: dict[str, dict[str, Any]] = {
    "resident": {},
    "packed documents in one kernel": {"model": {"dtype": "bfloat16"}, "packing": True},
    "nf4": {"model": {"quantization": "nf4"}},
    "int8_weight_only": {"model": {"quantization": "int8_weight_only"}},
    "dropout": {"adapter": LoraSettings(r=4, dropout=0.1)},
    "offloaded": OFFLOAD,
    "streamed from the host": HOST,
    "streamed nf4": HOST | {"model": {"quantization": "nf4"}},
}


@pytest.mark.parametrize("storage", STORAGES)
def test_no_storage_makes_the_host_wait(folder: Path, storage: str) -> None:
    settings = dict(STORAGES[storage])
    model = section(folder, **settings.pop("model", {}))
    assert waits_of(case_of(folder, model=model, **settings)) == {}


def test_an_embedding_on_the_host_is_looked_up_without_a_wait(folder: Path) -> None:
    """The ids are known there: asking the device for them would be a wait in every forward."""
    plain, gathered = case_of(folder, **HOST), case_of(folder, **HOST)
    gather_on_host(gathered.model.base.net.get_submodule("model.embed_tokens"), CUDA)
    assert waits_of(gathered) == {}
    plain.run()
    assert gathered.losses == plain.losses


def test_a_streamed_output_projection_makes_no_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(folder, **HOST)
    monkeypatch.setattr(vocabulary, "PART_BYTES", 64 * 64 * 4)
    base = case.model.base
    head = vocabulary.stream_head(base.family.head(base.net), CUDA, "host")
    case.model = case.parts.model = replace(case.model, streamed_head=head)
    assert waits_of(case) == {}


def test_a_base_on_the_disk_waits_for_the_ring_alone(folder: Path) -> None:
    """The thread that fills the ring waits for a part of it to be free; the computation does not."""
    assert set(waits_of(case_of(folder, **DISK))) <= {"event.synchronize"}


@pytest.mark.parametrize("method", sorted(set(known_names("adapters")) - {"bitfit", "lora"}))
def test_no_method_makes_the_host_wait(folder: Path, method: str) -> None:
    if settings_class("adapters", method).trains_base:
        pytest.skip("a base that is trained itself has an optimizer of its own size")
    rows, packing = make_rows(11), method not in WHOLE_MODEL
    case = make_case(
        folder, rows, training=training(max_steps=3), device=CUDA, adapter=adapter(method), packing=packing
    )
    assert waits_of(case) == {}
