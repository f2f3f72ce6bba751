"""Without the simulated device, which comes before torch, the tests here are not collected: scripts/test --devices."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama

collect_ignore_glob = [] if "tests.devices.plugin" in sys.modules else ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of four layers."""
    return write_tiny_llama(tmp_path_factory.mktemp("four-layers"), layers=4)
