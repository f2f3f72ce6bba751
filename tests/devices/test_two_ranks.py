"""Two machines with a simulated device each give the curve of one: every sum is taken of tensors on the device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import plugin
from tests.devices.test_runs import train, whole_device
from tests.support.train_case import free_port, records, write_recipe

__all__ = ["whole_device"]


WATCHING = """
import os, sys
from types import SimpleNamespace
import torch
from tests.devices import simulated
from tests.support.loop_case import Case
from tunekit.training.run import Run

found = []

def enter(step):
    simulated.DOUBLE.waits()
    torch.cuda.set_sync_debug_mode("warn" if step else "default")

def leave():
    torch.cuda.set_sync_debug_mode("default")
    found.extend(simulated.DOUBLE.waits())

class Watched(Run):
    def start(self):
        Case.watch_steps(SimpleNamespace(parts=self), enter, leave)
        return super().start()

    def _stop_if_asked(self):
        enter(self.state.step)
        try:
            super()._stop_if_asked()
        finally:
            leave()

from tunekit.training import begin
begin.Run = Watched
from tunekit.cli import main

try:
    main()
finally:
    print("waits:", found)
"""


def test_no_rank_waits_for_its_device_within_a_step(folder: Path, tmp_path: Path) -> None:
    """Counts of tokens and flags of signals are the host's, and are summed there."""
    script = tmp_path / "watching.py"
    script.write_text(WATCHING)
    outputs = run_two([str(script)], tmp_path, folder, "adapter.dropout=0", "training.save_steps=100", "data.eval=null")
    assert all("waits: []" in output for output in outputs), outputs


def run_two(program: list[str], place: Path, folder: Path, *overrides: str) -> list[str]:
    """What each of two ranks printed."""
    recipe = write_recipe(place, folder, rows=11)
    command = [sys.executable, *program, "train", str(recipe), *overrides, f"output.dir={place / 'run'}"]
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
    return outputs


@pytest.mark.parametrize("override", ["memory.streaming=off", "memory.streaming=host", "memory.sharding=full"])
def test_two_devices_give_the_curve_of_one(folder: Path, tmp_path: Path, override: str) -> None:
    one, _ = train(tmp_path / "one", folder, "adapter.dropout=0", override, device="cuda")
    run = tmp_path / "two" / "run"
    outputs = run_two(["-m", "tunekit"], tmp_path / "two", folder, "adapter.dropout=0", override)
    assert plugin.faults() == []
    assert outputs[0].count("report:") == 1
    single, double = records(one), records(run)
    assert len(single) == len(double) == 7
    for left, right in zip(single, double, strict=True):
        loss, other = (each.get("loss") or each["eval"]["loss"] for each in (left, right))
        assert other == pytest.approx(loss, rel=1e-5)
