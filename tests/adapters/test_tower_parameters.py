"""A mixture of experts with a tower: PEFT finds exactly the adapted layers, also where the tower has equal names."""

from __future__ import annotations

from pathlib import Path

from tests.architectures.cells import Trial
from tests.architectures.tiny import write_tiny


def test_peft_adapts_no_layer_of_the_tower(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    trial = Trial(write_tiny("glm4v_moe", tmp_path / "model"), tmp_path / "work")
    trial.try_plan()
    trial.try_train()
    trial.try_peft()
