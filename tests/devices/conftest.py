"""Without the simulated device, which comes before torch, the tests here are skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import write_tiny_llama


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items if "tests.devices.plugin" not in sys.modules else ():
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs the simulated device: scripts/test --devices"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of four layers."""
    return write_tiny_llama(tmp_path_factory.mktemp("four-layers"), layers=4)
