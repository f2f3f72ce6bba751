"""Devices of the tests here: each runs on a GPU where there is one, and on a CPU where the test has a double there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import write_tiny_llama

NO_GPU = "torch sees no CUDA device"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
CPU = pytest.param("cpu", marks=pytest.mark.slow)  # doubles: what they compute is in the quick tier elsewhere
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device`: both; `gpu`: a GPU alone."""
    if "device" in metafunc.fixturenames:
        simulated = "tests.devices.plugin" in sys.modules  # then what runs on the CPU is no double of anything
        metafunc.parametrize("device", [CUDA] if simulated else [CPU, CUDA], indirect=True)
    if "gpu" in metafunc.fixturenames:
        metafunc.parametrize("gpu", [CUDA], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of three layers."""
    return write_tiny_llama(tmp_path_factory.mktemp("three-layers"), layers=3)
