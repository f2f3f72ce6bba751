"""The plan of one rank, for tests."""

from __future__ import annotations

import torch

from tunekit.machine.devices import make_devices
from tunekit.planning.plan import plan
from tunekit.planning.prepare import prepare
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import ExecutionSettings, Plan
from tunekit.training.session import Planned
from tunekit.training.state import Processors


def make_plan(
    loaded: LoadedRecipe,
    *,
    device: torch.device | None = None,
    previous: ExecutionSettings | None = None,
    ranks: int = 1,
    processors: Processors | None = None,
) -> tuple[Plan, Planned]:
    """Prepare and plan the main rank of a run. `previous`: the settings of the run that is resumed."""
    device, resumed = device or make_devices().device, previous is not None
    return plan(
        prepare(loaded, device, ranks=ranks, resumed="run" if resumed else None, processors=processors),
        previous,
        may_recompute_more=resumed,
    )
