"""Layer by layer against all at once: bit for bit, whatever the method; and what keeps slots safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.loop_case import Case, make_case, make_rows
from tunekit.recipe.training import TrainingSection

LAYERS = 5
# Trained tensors that several layers share: gradients of layers are then summed in another order.
SHARED = {"vblora", "prefix", "fourierft", "randlora", "vera", "cpt", "p_tuning", "prompt", "multitask_prompt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("five-layers"), layers=LAYERS)


def training(**changes: Any) -> TrainingSection:
    values = {"learning_rate": 1e-2, "max_steps": 3, "epochs": None, "gradient_accumulation_steps": 3}
    return TrainingSection(**{**values, "scheduler": "constant", "warmup_ratio": 0.0, **changes})


def run(folder: Path, **changes: Any) -> Case:
    case = make_case(folder, make_rows(23), **{"training": training(), **changes})
    case.run()
    return case


def weights(case: Case) -> torch.Tensor:
    return torch.cat([flat.data.detach() for flat in case.optimizer.groups])


def test_one(folder: Path) -> None:
    plain, streamed = run(folder), run(folder, streaming={})
    assert plain.losses == streamed.losses
    assert torch.equal(weights(plain), weights(streamed))


def test_a_scalar_of_a_layer_can_be_unset() -> None:
    """Double quantization keeps one for each matrix."""
    from tunekit.memory.blobs import LayerBlob

    tensors = [torch.tensor(1.5), torch.ones(3, 2)]
    LayerBlob(tensors).unbind(torch.device("cpu"))
    assert all(tensor.isnan().all() for tensor in tensors)
    assert [tuple(tensor.shape) for tensor in tensors] == [(), (3, 2)]
