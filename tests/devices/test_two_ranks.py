"""Two machines with a simulated device each give the curve of one: every sum is taken of tensors on the device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import plugin
from tests.devices.test_runs import train, whole_device
from tests.support.train_case import records, write_recipe
from tests.training.test_ranks import free_port

__all__ = ["whole_device"]


@pytest.mark.parametrize("override", ["memory.streaming=off", "memory.streaming=host"])
def test_two_devices_give_the_curve_of_one(folder: Path, tmp_path: Path, override: str) -> None:
    one, _ = train(tmp_path / "one", folder, "adapter.dropout=0", override, device="cuda")
    recipe, run = write_recipe(tmp_path / "two", folder, rows=11), tmp_path / "two" / "run"
    overrides = ["adapter.dropout=0", override, f"output.dir={run}"]
    command = [sys.executable, "-m", "tunekit", "train", str(recipe), *overrides]
    several = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | several | {"TUNEKIT_DEVICE": ""}
    ranks = [
        subprocess.Popen(
            command, env=environment | {"RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in "01"
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert plugin.faults() == []
    assert outputs[0].count("report:") == 1
    single, double = records(one), records(run)
    assert len(single) == len(double) == 7
    for left, right in zip(single, double, strict=True):
        loss, other = (each.get("loss") or each["eval"]["loss"] for each in (left, right))
        assert other == pytest.approx(loss, rel=1e-5)
