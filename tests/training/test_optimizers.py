"""What a group of parameters says of its learning rate and its decay, as the update obeys it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from tunekit.errors import RunFolderError
from tunekit.recipe.training import OptimizerName, TrainingSection
from tunekit.training.optimizers import Optimizer, ParameterGroup


@pytest.mark.parametrize("kind", get_args(OptimizerName))
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_decay_and_rate_are_those_of_the_group(kind: Any, found_inf: float) -> None:
    """Without a gradient an update is the decay alone: w (1 - rate * multiplier * decay)."""
    parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("plain", "fast", "spared")}
    groups = [ParameterGroup(("plain",)), ParameterGroup(("fast",), 4.0), ParameterGroup(("spared",), decays=False)]
    optimizer = Optimizer(TrainingSection(optimizer=kind, learning_rate=0.1, weight_decay=0.5), groups, parameters)
    assert optimizer.step(0.5, torch.tensor(found_inf)) == pytest.approx(0.05)
    expected = {"plain": 1 - 0.05 * 0.5, "fast": 1 - 0.2 * 0.5, "spared": 1.0}
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), torch.full((3,), 1.0 if found_inf else expected[name]))


def test_a_checkpoint_without_a_groups_weights_is_refused() -> None:
    optimizer = Optimizer(TrainingSection(), [ParameterGroup(("a",))], {"a": torch.nn.Parameter(torch.ones(3))})
    tensors = optimizer.state_tensors()
    for changed in ({}, {"group0.weights": tensors["group0.weights"][:2]}):
        with pytest.raises(RunFolderError, match="weights of group 0 are missing or have the wrong shape"):
            optimizer.load_state(changed, optimizer.layout())
