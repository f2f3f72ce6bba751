"""GPUs of other generations: what each lacks is left out, replaced, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.devices import simulated
from tests.devices.test_mistakes import CUDA
from tests.devices.test_steps import section
from tests.support.loop_case import make_case, make_rows
from tests.training.test_loop import training
from tunekit.errors import ModelError
from tunekit.model.attention.documents import VARLEN
from tunekit.model.quantized.fp8 import computes_fp8

LOOPED = "sdpa_per_document"


@pytest.fixture
def generation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    major, minor = request.param
    monkeypatch.setattr(simulated.DOUBLE.properties, "major", major)
    monkeypatch.setattr(simulated.DOUBLE.properties, "minor", minor)
    return major, minor


@pytest.mark.parametrize("generation", [(7, 5)], indirect=True)
def test_turing_has_neither_bfloat16_nor_the_kernel_over_documents(folder: Path, generation: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="this device only emulates bfloat16"):
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


@pytest.mark.parametrize("generation", [(8, 0), (9, 0)], indirect=True)
def test_later_ones_have_both(folder: Path, generation: tuple[int, int]) -> None:
    case = make_case(
        folder, make_rows(7), training=training(max_steps=2), device=CUDA, model=section(folder, "bfloat16"),
        packing=True,
    )  # fmt: skip
    assert case.model.base.facts.attention == VARLEN
    case.run()
    assert len(case.losses) == 2
    assert computes_fp8(CUDA) == (generation >= (9, 0))
