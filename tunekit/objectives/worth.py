"""Numbers over completions: means and spreads of rewards, some of which are absent, and what is logged of a step.

Comes in: arrays of rewards, lengths, ratios.  Goes out: arrays, tensors, numbers by name.  NaN is no reward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.machine.devices import summing_dtype
from tunekit.objectives.rewards import Rewards, Scores

CLIPPED = ("clip_ratio_low_mean", "clip_ratio_high_mean", "clip_ratio_region_mean")
LEAST_SPREAD = 1e-4  # added to a standard deviation that advantages are divided by


def spread(values: Scores, axis: int | None = None) -> Scores:
    """Standard deviation (n - 1) of what is not NaN; NaN of fewer than two numbers."""
    count = np.sum(~np.isnan(values), axis=axis)
    mean = np.nansum(values, axis=axis, keepdims=True) / np.maximum(
        np.sum(~np.isnan(values), axis=axis, keepdims=True), 1
    )
    squares = np.nansum((values - mean) ** 2, axis=axis)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)


def mean(values: Scores, axis: int | None = None) -> Scores:
    """Of what is not NaN; NaN of nothing."""
    count = np.sum(~np.isnan(values), axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def reward_metrics(rewards: Rewards, scores: Scores, equal: NDArray[np.bool_]) -> dict[str, float]:
    """Mean and spread of the reward, and of each of which it is the sum; the share of groups whose rewards are equal.

    Shapes: scores (A, G, F), equal (A,).
    """
    found = {"reward": rewards.summed(scores)}
    numbers = {name: function(found["reward"]) for name, function in (("reward", mean), ("reward_std", spread))}
    numbers["frac_reward_zero_std"] = equal.mean()
    for at, name in enumerate(rewards.names):
        numbers |= {f"rewards_{name}_mean": mean(scores[..., at]), f"rewards_{name}_std": spread(scores[..., at])}
    return {name: float(value) for name, value in numbers.items() if np.isfinite(value)}


def length_metrics(lengths: NDArray[Any], ended: NDArray[np.bool_]) -> dict[str, float]:
    """Tokens of the step's completions, and the share of them that did not end. Shapes: (A, G) each."""
    complete = lengths[ended]
    return {
        "completions_mean_length": float(lengths.mean()),
        "completions_min_length": float(lengths.min()),
        "completions_max_length": float(lengths.max()),
        "completions_clipped_ratio": float(1 - ended.mean()),
        "completions_mean_terminated_length": float(complete.mean()) if len(complete) else 0.0,
    }


def clipped_ratios(ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Where clipping takes the gradient away."""
    below, above = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    return dict(zip(CLIPPED, (below, above, below | above), strict=True))


def by_token(values: Tensor, counts: Tensor) -> Tensor:
    """A number of each completion for each of its tokens. Shapes: values (S,), counts (S,) -> (N,)."""
    return torch.cat([value.expand(count) for value, count in zip(values, counts.tolist(), strict=True)])


def summed(values: Tensor) -> Tensor:
    """() of what is logged, without gradient."""
    return values.detach().sum(dtype=summing_dtype(values.device))
