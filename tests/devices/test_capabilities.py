"""GPUs of other generations: what each lacks is left out, replaced, or refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState

from tests.devices import simulated
from tests.devices.test_mistakes import CUDA
from tests.devices.test_runs import train, whole_device
from tests.devices.test_steps import section
from tests.support.loop_case import make_case, make_rows
from tests.support.train_case import records
from tests.training.test_loop import training
from tunekit.doctor import machine_facts
from tunekit.errors import ModelError
from tunekit.machine.devices import Devices
from tunekit.model.attention.documents import VARLEN
from tunekit.model.quantized.fp8 import computes_fp8

__all__ = ["whole_device"]
LOOPED = "sdpa_per_document"


@pytest.fixture
def generation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    major, minor = request.param
    monkeypatch.setattr(simulated.DOUBLE.properties, "major", major)
    monkeypatch.setattr(simulated.DOUBLE.properties, "minor", minor)
    return major, minor


@pytest.mark.parametrize("generation", [(7, 5)], indirect=True)
def test_doctor_names_the_dtype_of_a_run(generation: tuple[int, int]) -> None:
    assert machine_facts()[0]["computes_in"] == "float16"


@pytest.mark.parametrize("launched", [False, True])
def test_cards_without_p2p_and_with_an_old_driver_can_be_used(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate refuses RTX 40 cards with old drivers, unless NCCL is told to leave P2P and InfiniBand out."""
    for module in ("accelerate.utils", "accelerate.state"):
        monkeypatch.setattr(f"{module}.check_cuda_p2p_ib_support", lambda: False)
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "0")  # so that the test restores it
        monkeypatch.delenv(name)
    monkeypatch.setattr("tunekit.machine.devices.is_launched", lambda: launched)
    PartialState._reset_state()
    Devices(CUDA).close()
    assert os.environ["NCCL_P2P_DISABLE"] == "1"


def test_convolutions_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch allows TF32 for convolutions by default, and for products not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Devices(CUDA).close()
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("generation", [(7, 5)], indirect=True)
def test_turing_has_neither_bfloat16_nor_the_kernel_over_documents(folder: Path, generation: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="this device computes bfloat16 only by slow emulation"):
        make_case(folder, make_rows(3), training=training(), device=CUDA, model=section(folder, "bfloat16"))
    case = make_case(
        folder,
        make_rows(7),
        training=training(max_steps=2),
        device=CUDA,
        model=section(folder, "float16"),
        packing=True,
    )
    assert case.model.base.facts.attention == LOOPED
    case.run()  # where the kernel would have refused the device
    assert len(case.losses) == 2
    assert not computes_fp8(CUDA)


@pytest.mark.parametrize("generation", [(7, 5)], indirect=True)
def test_turing_trains_in_float16_with_the_scaler_and_plan_states_it(
    folder: Path, tmp_path: Path, generation: tuple[int, int]
) -> None:
    run, report = train(tmp_path, folder, model={"dtype": "auto"}, device="cuda")
    assert any(
        "auto is float16 with a loss scale" in note for note in json.loads((run / "plan.json").read_text())["notes"]
    )
    assert "skipped_steps" not in report or report["skipped_steps"] < 3
    norms = [
        [each["grad_norm"] for each in records(place) if "grad_norm" in each]
        for place in (run, plain(tmp_path, folder))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def plain(place: Path, folder: Path) -> Path:
    """The same run in float32."""
    return train(place / "plain", folder, device="cuda")[0]


@pytest.mark.parametrize("generation", [(8, 0), (8, 9), (9, 0)], indirect=True)
def test_later_ones_have_both(folder: Path, generation: tuple[int, int]) -> None:
    case = make_case(
        folder, make_rows(7), training=training(max_steps=2), device=CUDA, model=section(folder, "bfloat16"),
        packing=True,
    )  # fmt: skip
    assert case.model.base.facts.attention == VARLEN
    case.run()
    assert len(case.losses) == 2
    assert computes_fp8(CUDA) == (generation >= (8, 9))
