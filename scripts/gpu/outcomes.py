"""A plugin of pytest that writes the outcome of each test to the file in TUNEKIT_OUTCOMES as soon as the test has
ended.

Tests with an outcome in that file do not run again. The others run in the order of suite.ORDER.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from suite import MESSAGE_CHARACTERS, ORDER, function_of, read_outcomes

BROKEN = ("CUDA error", "AcceleratorError")  # after one of these no kernel of the process succeeds
FILE = Path(os.environ["TUNEKIT_OUTCOMES"])


def write(**record: Any) -> None:
    """Append one line."""
    with FILE.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


@pytest.hookimpl(trylast=True)  # after -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only the tests without an outcome, and put the most important tests first."""
    places = {name: place for place, name in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(function_of(item.nodeid), len(places)))
    write(collected=[item.nodeid for item in items])
    done = read_outcomes(FILE)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    write(test=nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Write the outcome of the test's call, or of its setup or teardown if that failed. Stop if the device's state is
    broken."""
    report: pytest.TestReport = yield
    if report.when == "call" or report.outcome != "passed":
        properties = dict(report.user_properties)
        write(
            test=item.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 2),
            **({} if report.outcome == "passed" else {"message": message_of(report)}),
            **({"properties": properties} if properties else {}),
        )
    if report.failed and any(mark in report.longreprtext for mark in BROKEN):
        item.session.shouldstop = "the device's state is broken"
    return report


def message_of(report: pytest.TestReport) -> str:
    """Why a test failed or was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longreprtext)[:MESSAGE_CHARACTERS]
