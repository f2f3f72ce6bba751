"""Chooses the next token of each row: the most likely token, or a token sampled with the row's own random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Sampling
from tunekit.errors import InputError
from tunekit.machine.devices import summing_dtype

PROBABILITY_UNITS = 2.0**52
MIN_TEMPERATURE = 1e-5  # dividing logits by less would overflow; a lower temperature counts as 0


# settings of Sampling: default, minimum and maximum
PENALTIES = {
    "min_p": (0.0, 0.0, 1.0),
    "repetition_penalty": (1.0, 0.01, 10.0),
    "presence_penalty": (0.0, -2.0, 2.0),
    "frequency_penalty": (0.0, -2.0, 2.0),
}


def with_penalties(sampling: Sampling, options: Sequence[str]) -> Sampling:
    """The settings with options NAME=VALUE of the command line. Raises: InputError."""
    pairs = (option.partition("=") for option in options)
    values: dict[str, Any] = {name: penalty(name, value) for name, _, value in pairs}
    return replace(sampling, **values)


def penalty(name: str, value: str) -> float:
    """The value of a setting of PENALTIES. Raises: InputError if it is not known, or out of range."""
    if name not in PENALTIES:
        raise InputError(f"there is no penalty '{name}'", f"the penalties are: {', '.join(PENALTIES)}")
    _, low, high = PENALTIES[name]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise InputError(f"{name} is '{value}'", f"write a number from {low:g} to {high:g}")
    return number


class Score(NamedTuple):
    """The log-probability of a token. `top`: the most likely tokens at the same position, with their log-probabilities,
    in descending order."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """The random numbers of one row. They depend only on the row's seed and on the number of tokens sampled so far, not
    on other rows."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.is_greedy = sampling, sampling.temperature < MIN_TEMPERATURE
        self._bits = None if self.is_greedy else np.random.Philox(key=sampling.seed)

    def number(self) -> float:
        """The next number in [0, 1)."""
        assert self._bits is not None
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53


def penalized(logits: Tensor, sampling: Sampling, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The logits (V,) with the row's penalties and bias. `tokens`: the new tokens so far.

    The repetition penalty divides positive logits and multiplies negative ones, of tokens of the prompt and new tokens
    (Keskar et al. 2019, eq. 1, as in transformers). Then logit -= frequency_penalty * count + presence_penalty *
    (count > 0), where `count` counts new tokens, and the bias is added (OpenAI's API reference).
    """
    logits = logits.clone()
    if sampling.repetition_penalty != 1 and (prompt or tokens):
        seen = torch.tensor(sorted({*prompt, *tokens}), device=logits.device)
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if tokens:
        counts = torch.bincount(torch.tensor(tokens), minlength=len(logits)).to(logits)
        logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    return logits


def choose(logits: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Choose the next token of each row: logits (B, V) float32 -> (B,) int64."""
    groups: dict[tuple[float, float, int, float] | None, list[int]] = {}
    for row, sampler in enumerate(samplers):
        wanted = sampler.sampling
        key = None if sampler.is_greedy else (wanted.temperature, wanted.top_p, wanted.top_k, wanted.min_p)
        groups.setdefault(key, []).append(row)
    if list(groups) == [None]:
        return logits.argmax(dim=-1)
    tokens = torch.empty(len(samplers), dtype=torch.int64, device=logits.device)
    for key, rows in groups.items():
        scores = logits if len(groups) == 1 else logits[rows]
        if key is None:
            tokens[rows] = scores.argmax(dim=-1)
            continue
        numbers = torch.tensor([samplers[row].number() for row in rows], dtype=torch.float64)
        drawn = draw(limited(scores, *key), numbers.to(summing_dtype(scores.device)).to(scores.device))
        tokens[rows] = drawn[:, 0]
    return tokens


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Score]:
    """Score one token per row, and list the `top` most likely tokens of each row. Shapes: logits (B, V)."""
    logprobs = logits.float().log_softmax(dim=-1)  # (B, V)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, places = (part.tolist() for part in logprobs.topk(min(top, logits.shape[-1]), dim=-1))
    return [Score(*parts) for parts in zip(chosen, map(tuple, map(zip, places, values)), strict=True)]


def limited(scores: Tensor, temperature: float, top_p: float, top_k: int, min_p: float) -> Tensor:
    """Divide scores (B, V) by the temperature, and set tokens that top_k, top_p or min_p excludes to -inf, in this
    order, as in transformers."""
    scores = scores / temperature if temperature != 1 else scores
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1]))[0][..., -1:]  # (B, 1)
        scores = scores.masked_fill(scores < least, -torch.inf)
    scores = _top_p(scores, top_p) if top_p < 1 else scores
    if min_p:
        probabilities = scores.softmax(dim=-1)  # (B, V)
        scores = scores.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)
    return scores


def _top_p(scores: Tensor, share: float) -> Tensor:
    """Set the scores (B, V) of unlikely tokens to -inf. The most likely tokens, whose probabilities sum to `share`,
    keep their scores, as in transformers' top_p."""
    ordered, places = scores.sort(dim=-1)
    unlikely = cumulative_sums(ordered.float().softmax(dim=-1)) <= int((1 - share) * PROBABILITY_UNITS)  # (B, V)
    unlikely[:, -1] = False
    return scores.masked_fill(unlikely.scatter(1, places, unlikely), -torch.inf)


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Sample one token per row, (B, 1): the first token whose cumulative probability exceeds the row's random number.

    Shapes: logits (B, V) float32, numbers (B,) in [0, 1).
    """
    total = cumulative_sums(torch.softmax(logits, dim=-1))  # (B, V)
    reached = (numbers[:, None] * total[:, -1:].to(numbers.dtype)).to(torch.int64)  # (B, 1)
    return torch.searchsorted(total, reached, right=True).clamp(max=logits.shape[-1] - 1)


def cumulative_sums(probabilities: Tensor) -> Tensor:
    """Cumulative sums of probabilities (B, V), as int64 in units of 2^-52. Sums of integers are the same in any
    order of the elements. On a GPU this order varies."""
    return (probabilities * PROBABILITY_UNITS).to(torch.int64).cumsum(dim=-1)
