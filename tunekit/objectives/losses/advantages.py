"""Functions for policy losses (GRPO, RLOO): statistics of rewards, metrics of a step, and per-token values. A reward of
NaN means that the completion has no reward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import Batch, ModelOutput
from tunekit.machine.devices import summing_dtype
from tunekit.machine.placing import to_device
from tunekit.objectives.losses.answers import predicted
from tunekit.objectives.rows.prompts import PER_COMPLETION, PER_TOKEN

Rewards = NDArray[np.float64]
CLIPPED = ("clip_ratio_low_mean", "clip_ratio_high_mean", "clip_ratio_region_mean")
MINIMUM_SPREAD = 1e-4  # added to a standard deviation before advantages are divided by it


def spread(values: Rewards, axis: int | None = None) -> Rewards:
    """Standard deviation (with n - 1) of the numbers that are not NaN; NaN if fewer than two numbers are not NaN."""
    judged = ~np.isnan(values)
    count = np.sum(judged, axis=axis)
    mean = np.nansum(values, axis=axis, keepdims=True) / np.maximum(np.sum(judged, axis=axis, keepdims=True), 1)
    squares = np.nansum((values - mean) ** 2, axis=axis)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)


def mean(values: Rewards, axis: int | None = None) -> Rewards:
    """Mean of the numbers that are not NaN; NaN if all numbers are NaN."""
    count = np.sum(~np.isnan(values), axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def teaches_nothing(rewards: Rewards, axis: int | None = None) -> NDArray[np.bool_]:
    """Whether all advantages would be 0: the rewards are all equal, or fewer than two are not NaN."""
    deviation = spread(rewards, axis)
    return np.isnan(deviation) | np.isclose(deviation, 0.0)


def scaled(values: Rewards, deviation: Rewards) -> Rewards:
    """Divide advantages by a standard deviation, which may be 0."""
    return values / (deviation + MINIMUM_SPREAD)


def weighted_sum(scores: Rewards, weights: Sequence[float]) -> Rewards:
    """The sum of each completion's rewards, weighted by reward function. NaN rewards are left out; the sum is NaN if
    all are NaN.
    Shapes: (..., F) -> (...)."""
    total = np.nansum(scores * np.array(weights, np.float64), axis=-1)
    return np.where(np.isnan(scores).all(axis=-1), np.nan, total)


def reward_metrics(names: Sequence[str], scores: Rewards, total: Rewards, equal: NDArray[np.bool_]) -> dict[str, float]:
    """Mean and standard deviation of the total reward, and of each function's rewards. Also the share of groups whose
    rewards are all equal, and the share of completions without a reward.

    Shapes: scores (A, G, F), total (A, G), equal (A,), for A prompts, G completions of each prompt, and F reward
    functions.
    """
    numbers = {name: function(total) for name, function in (("reward", mean), ("reward_std", spread))}
    numbers |= {"frac_reward_zero_std": equal.mean(), "frac_reward_none": np.isnan(total).mean()}
    for at, name in enumerate(names):
        numbers |= {f"rewards_{name}_mean": mean(scores[..., at]), f"rewards_{name}_std": spread(scores[..., at])}
    return {name: float(value) for name, value in numbers.items() if np.isfinite(value)}


def length_metrics(lengths: NDArray[Any], ended: NDArray[np.bool_]) -> dict[str, float]:
    """The mean, minimum and maximum length in tokens of the step's completions, and the share of completions without a
    stop token.
    Shapes: lengths, ended (A, G), for A prompts and G completions of each prompt."""
    complete = lengths[ended]
    return {
        "completions_mean_length": float(lengths.mean()),
        "completions_min_length": float(lengths.min()),
        "completions_max_length": float(lengths.max()),
        "completions_clipped_ratio": float(1 - ended.mean()),
        "completions_mean_terminated_length": float(complete.mean()) if len(complete) else 0.0,
    }


def clipping(ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Whether each ratio is clipped, so that it has no gradient: at the lower limit, at the upper limit, and at either
    limit."""
    below, above = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    return dict(zip(CLIPPED, (below, above, below | above), strict=True))


class Tokens(NamedTuple):
    """Values of all tokens in a batch's completions, shape (N,). `counts` (G P,): the number of tokens of each
    completion.

    `log_ratio`: the token's log-probability minus its log-probability at sampling. `share`: the weight of a token in a
    mean over tokens. `prepared`: values of tokens or completions that the loss's `prepare` added.
    """

    logps: Tensor
    log_ratio: Tensor
    entropies: Tensor
    share: Tensor
    counts: Tensor
    prepared: dict[str, Tensor]


def read_tokens(output: ModelOutput, batch: Batch, temperature: float) -> Tokens:
    """The values of the tokens in the batch's completions, with gradient. Shapes: output.hidden (B, T, D) -> (N,)."""
    assert output.hidden is not None
    device, counts = output.hidden.device, batch.targets["counts"]
    names = (*PER_TOKEN, *PER_COMPLETION, "share")
    prepared = {name: to_device(values, device) for name, values in batch.targets.items() if name in names}
    entropies = torch.zeros(int(counts.sum()), dtype=torch.float32, device=device)  # (N,)
    logps = predicted(output, batch, temperature, entropies)  # (N,)
    log_ratio = logps - prepared.get("old", logps.detach())  # (N,)
    share = by_token(prepared["share"][:, 0].repeat(len(counts) // len(batch.rows)), counts)  # (N,)
    return Tokens(logps, log_ratio, entropies, share, counts, prepared)


def by_token(values: Tensor, counts: Tensor) -> Tensor:
    """The value of each completion, repeated for each of its tokens. Shapes: values (S,), counts (S,) -> (N,)."""
    return torch.cat([value.expand(count) for value, count in zip(values, counts.tolist(), strict=True)])


def summed(values: Tensor) -> Tensor:
    """The sum of the values of a metric, a scalar without gradient."""
    return values.detach().sum(dtype=summing_dtype(values.device))
