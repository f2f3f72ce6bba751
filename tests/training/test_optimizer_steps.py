"""Each optimizer's step against its published formula, written here independently in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit.recipe.training import TrainingSection
from tunekit.training.optimizers import FlatGroup, Optimizer

RATE, DECAY, STEPS = 1e-2, 0.1, 5
SHAPES = {"matrix": (6, 10), "tall": (12, 4), "vector": (7,), "experts": (3, 4, 5)}
State = dict[str, Any]


def adamw(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2."""
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * gradient
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * gradient**2
    first, second = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
    return weight - RATE * (first / (second.sqrt() + 1e-8) + DECAY * weight)


def lion(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
    """Chen et al. 2023, algorithm 2, with the paper's betas 0.9 and 0.99."""
    momentum = state.get("m", torch.zeros_like(weight))
    update = (0.9 * momentum + 0.1 * gradient).sign()
    state["m"] = 0.99 * momentum + 0.01 * gradient
    return weight - RATE * (update + DECAY * weight)


def adafactor(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
    """Shazeer and Stern 2018, algorithms 4 and 5, with the schedule's rate in place of the relative step."""
    state["t"] = state.get("t", 0) + 1
    decay, square = 1 - state["t"] ** -0.8, gradient**2 + 1e-30
    if weight.dim() >= 2:
        state["r"] = decay * state.get("r", 0) + (1 - decay) * square.mean(-1)
        state["c"] = decay * state.get("c", 0) + (1 - decay) * square.mean(-2)
        second = state["r"][..., :, None] * state["c"][..., None, :] / state["r"].mean(-1)[..., None, None]
    else:
        second = state["v"] = decay * state.get("v", 0) + (1 - decay) * square
    update = gradient / second.sqrt()
    update /= max(1.0, update.pow(2).mean().sqrt().item())
    return weight - RATE * (update + DECAY * weight)


def muon(weight: Tensor, gradient: Tensor, state: State) -> Tensor:
    """Jordan et al. 2024 (momentum 0.95, Nesterov, five Newton-Schulz iterations), scaled as by Liu et al. 2025, eq. 4;
    AdamW for tensors that are no matrices."""
    if weight.dim() != 2:
        return adamw(weight, gradient, state)
    state["m"] = 0.95 * state.get("m", torch.zeros_like(weight)) + 0.05 * gradient
    step = 0.95 * state["m"] + 0.05 * gradient
    x = step.T if step.shape[0] > step.shape[1] else step
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    x = x.T if step.shape[0] > step.shape[1] else x
    return weight - RATE * (0.2 * math.sqrt(max(weight.shape)) * x + DECAY * weight)


# torch computes Muon's iterations in bfloat16, whose rounding is 2**-8 of an update
CASES: dict[str, tuple[Callable[..., Tensor], float]] = {
    "adamw": (adamw, 1e-6),
    "lion": (lion, 1e-6),
    "adafactor": (adafactor, 1e-6),
    "muon": (muon, RATE * STEPS * 0.2 * math.sqrt(12) * 0.02),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_published_one(name: Any) -> None:
    """Five steps, with a checkpoint in the middle that a new optimizer continues."""
    formula, tolerance = CASES[name]
    generator = torch.Generator().manual_seed(1)
    start = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    gradients = [{key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()} for _ in range(STEPS)]
    expected, states = {key: value.double() for key, value in start.items()}, {key: {} for key in SHAPES}
    settings = TrainingSection(optimizer=name, learning_rate=RATE, weight_decay=DECAY)
    parameters = {key: torch.nn.Parameter(value.clone()) for key, value in start.items()}
    optimizer = Optimizer(settings, [FlatGroup(parameters, 1.0, True)])
    for number, gradient in enumerate(gradients):
        if number == 3:
            saved = {key: value.clone() for key, value in optimizer.state_tensors().items()}
            parameters = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in SHAPES.items()}
            optimizer = Optimizer(settings, [FlatGroup(parameters, 1.0, True)])
            optimizer.load_state(saved, optimizer.layout())
        for key, parameter in parameters.items():
            assert parameter.grad is not None
            parameter.grad.copy_(gradient[key])
            expected[key] = formula(expected[key], gradient[key].double(), states[key])
        optimizer.step(1.0, torch.tensor(0.0))
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), expected[key], rtol=1e-5, atol=tolerance)


def test_muon_leaves_embeddings_and_heads_to_adamw() -> None:
    """Weight decay does not apply to embeddings, which is how they are known."""
    parameters = {name: torch.nn.Parameter(torch.ones(4, 4)) for name in ("hidden", "head", "embedding")}
    trained = {name: parameters[name] for name in ("hidden", "head")}
    groups = [FlatGroup(trained, 1.0, True), FlatGroup({"embedding": parameters["embedding"]}, 1.0, False)]
    optimizer = Optimizer(TrainingSection(optimizer="muon"), groups, heads=["head"])
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad.normal_(generator=generator)
    optimizer.step(1.0, torch.tensor(0.0))
    kinds = {name: sorted(key.split(".")[-1] for key in optimizer.state_tensors()) for name in ("all",)}
    assert kinds["all"].count("momentum_buffer") == 1
    assert kinds["all"].count("exp_avg") == 2
