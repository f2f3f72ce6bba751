"""Chooses the next token of each row: the most likely token, or a token sampled with the row's own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Sampling
from tunekit.machine.devices import summing_dtype

PROBABILITY_UNITS = 2.0**52
MIN_TEMPERATURE = 1e-5  # dividing logits by less would overflow; a lower temperature counts as 0


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


def choose(logits: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    """Choose the next token of each row: logits (B, V) float32 -> (B,) int64."""
    groups: dict[tuple[float, float, int] | None, list[int]] = {}
    for row, sampler in enumerate(samplers):
        wanted = sampler.sampling
        key = None if sampler.is_greedy else (wanted.temperature, wanted.top_p, wanted.top_k)
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
        drawn = draw(_limited(scores, *key), numbers.to(summing_dtype(scores.device)).to(scores.device))
        tokens[rows] = drawn[:, 0]
    return tokens


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[Score]:
    """Score one token per row, and list the `top` most likely tokens of each row. Shapes: logits (B, V)."""
    logprobs = logits.float().log_softmax(dim=-1)  # (B, V)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, places = (part.tolist() for part in logprobs.topk(min(top, logits.shape[-1]), dim=-1))
    return [Score(*parts) for parts in zip(chosen, map(tuple, map(zip, places, values)), strict=True)]


def _limited(scores: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Divide scores (B, V) by the temperature, and set tokens that top_k or top_p excludes to -inf, as in
    transformers."""
    scores = scores / temperature if temperature != 1 else scores
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1]))[0][..., -1:]  # (B, 1)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return _top_p(scores, top_p) if top_p < 1 else scores


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
