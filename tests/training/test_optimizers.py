"""What a group of parameters says of its learning rate and its decay, as the update obeys it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from tunekit.errors import RunFolderError
from tunekit.recipe.training import OptimizerName, TrainingSection
from tunekit.training import optimizers
from tunekit.training.optimizers import FlatGroup, Optimizer


@pytest.mark.parametrize("kind", get_args(OptimizerName))
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_decay_and_rate_are_those_of_the_group(kind: Any, found_inf: float) -> None:
    """Without a gradient an update is the decay alone: w (1 - rate * multiplier * decay)."""
    parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("plain", "fast", "spared")}
    settings = {"plain": (1.0, True), "fast": (4.0, True), "spared": (1.0, False)}
    groups = [FlatGroup({name: parameters[name]}, *values) for name, values in settings.items()]
    optimizer = Optimizer(TrainingSection(optimizer=kind, learning_rate=0.1, weight_decay=0.5), groups)
    assert optimizer.step(0.5, torch.tensor(found_inf)) == pytest.approx(0.05)
    expected = {"plain": 1 - 0.05 * 0.5, "fast": 1 - 0.2 * 0.5, "spared": 1.0}
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), torch.full((3,), 1.0 if found_inf else expected[name]))


def test_a_checkpoint_without_a_groups_weights_is_refused() -> None:
    optimizer = Optimizer(TrainingSection(), [FlatGroup({"a": torch.nn.Parameter(torch.ones(3))}, 1.0, True)])
    tensors = optimizer.state_tensors()
    for changed in ({}, {"group0.weights": tensors["group0.weights"][:2]}):
        with pytest.raises(RunFolderError, match="weights of group 0 are missing or have the wrong shape"):
            optimizer.load_state(changed, optimizer.layout())


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw"])
def test_no_tensor_is_longer_than_bitsandbytes_can_count(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2^31 numbers on, it would update some of the weights only, or none."""

    def trained(steps: int, restored: dict[str, torch.Tensor] | None = None) -> Optimizer:
        generator = torch.Generator().manual_seed(1)
        parameters = {"weight": torch.nn.Parameter(torch.randn(16_400, generator=generator))}
        optimizer = Optimizer(TrainingSection(optimizer=name), [FlatGroup(parameters, 1.0, True)])
        gradients = [torch.randn(16_400, generator=generator) for _ in range(2)]
        if restored is not None:
            optimizer.load_state(restored, optimizer.layout())
        for gradient in gradients[2 - steps :] if restored is not None else gradients[:steps]:
            optimizer.gradients()[0].copy_(gradient)
            optimizer.step(1.0, torch.tensor(0.0))
        return optimizer

    whole = trained(2)
    monkeypatch.setattr(optimizers, "PART_NUMBERS", 6000)
    split = trained(2)
    assert [len(part) for part in split.native.param_groups[0]["params"]] == [5632, 5632, 5136]
    assert torch.equal(whole.state_tensors()["group0.weights"], split.state_tensors()["group0.weights"])
    first = {key: value.clone() for key, value in trained(1).state_tensors().items()}
    resumed = trained(1, first).state_tensors()
    assert resumed.keys() == split.state_tensors().keys()
    assert all(torch.equal(value, resumed[key]) for key, value in split.state_tensors().items())
    monkeypatch.undo()
    first = {key: value.clone() for key, value in trained(1).state_tensors().items()}  # of an older version: one part
    monkeypatch.setattr(optimizers, "PART_NUMBERS", 6000)
    with pytest.raises(RunFolderError, match="an older tunekit wrote the optimizer's state of 16,400 weights in one"):
        trained(1, first)
