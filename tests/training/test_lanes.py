"""Several runs over one streamed base, layer by layer: each equals its own run bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.loop_case import Case, make_case, make_rows
from tunekit.memory.streaming import layer_weights, make_slots, shared_slots
from tunekit.model.load import load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import settings_class
from tunekit.recipe.training import TrainingSection
from tunekit.training.engines.together import Together
from tunekit.training.lane import run_lanes
from tunekit.training.loop import loop_steps
from tunekit.tuned.twin import make_twin

CPU = torch.device("cpu")


def training(seed: int, **changes: Any) -> TrainingSection:
    values = {"learning_rate": 1e-2, "max_steps": 3, "epochs": None, "gradient_accumulation_steps": 3, "seed": seed}
    return TrainingSection(**{**values, "scheduler": "constant", "warmup_ratio": 0.0, "micro_batch_size": 2, **changes})


def weights(case: Case) -> Tensor:
    return torch.cat([flat.data.detach() for flat in case.optimizer.groups])


class Lanes:
    """Runs with different adapters, rows and lengths over a base streamed from host memory: each alone, and all
    together."""

    def __init__(self, model: ModelSection, lanes: list[dict[str, Any]]) -> None:
        self.model, self.lanes = model, lanes
        self.warnings: list[str] = []

    def alone(self) -> list[Case]:
        cases = [self._case(lane) for lane in self.lanes]
        for case in cases:
            case.run()
        return cases

    def together(self) -> list[Case]:
        base = load_model(self.model, device=CPU)
        base.slots = make_slots(layer_weights(base), CPU, tier="host", mapped=base.mapped, poison=True)
        cases = [self._case(lane, base=make_twin(base)) for lane in self.lanes]
        for case in cases:
            case.model.slots = shared_slots(base)
        run_lanes([loop_steps(case.parts) for case in cases], Together(self.warnings.append))
        assert self.warnings == []
        return cases

    def _case(self, lane: dict[str, Any], **changes: Any) -> Case:
        rows = make_rows(23, seed=lane["rows"])
        return make_case(
            Path(),
            rows,
            training=lane["training"],
            adapter=lane["adapter"],
            model=self.model,
            end_to_end=True,
            max_length=64,
            streaming={},
            **changes,
        )


def lora(**changes: Any) -> LoraSettings:
    return LoraSettings(**{"r": 4, "alpha": 8.0, **changes})


def test_runs_together_equal_separate_runs(tiny_llama: Path) -> None:
    """Also with dropout, another method, rows and a seed of their own, and a run that ends earlier."""
    dora = settings_class("adapters", "dora").model_validate({"method": "dora", "r": 4})
    adapters = [lora(), dora, lora(r=8, dropout=0.2)]
    lanes = [{"adapter": adapter, "rows": at, "training": training(at)} for at, adapter in enumerate(adapters)]
    lanes[0]["training"] = training(0, max_steps=2)
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32", quantization="nf4")
    runs = Lanes(section, lanes)
    for one, other in zip(runs.alone(), runs.together(), strict=True):
        assert one.losses == other.losses
        assert torch.equal(weights(one), weights(other))
