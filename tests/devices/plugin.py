"""pytest -p tests.devices.plugin: every test, with the processes that it starts, has the simulated device, and fails
where the device saw a fault."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.devices import build, simulated

REPOSITORY, HERE = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
if build.missing() is None:
    os.environ["TUNEKIT_SIMULATED_FAULTS"] = tempfile.mkstemp(prefix="faults-")[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "child"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("TUNEKIT_TEST_DEVICE", f"{build.KIND}:0")
    build.library()  # before there are several processes that would all build it
    simulated.prepare()


def faults() -> list[str]:
    """What the device, and those of child processes, saw since the last call: accesses that nothing orders, and others
    that are wrong."""
    file = Path(os.environ["TUNEKIT_SIMULATED_FAULTS"])
    found = file.read_text().splitlines()
    file.write_text("")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = build.missing()
    for item in items if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    faults()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> object:
    result = yield
    found = faults()
    if found and item.get_closest_marker("faulty") is None:
        pytest.fail(f"the device saw {len(found)} faults: " + "; ".join(sorted(set(found))[:8]), pytrace=False)
    return result


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faulty: makes faults on purpose, and looks at them itself")
