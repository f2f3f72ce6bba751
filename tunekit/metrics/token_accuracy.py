"""Share of supervised tokens that are the model's first choice, given the true tokens before them."""

from __future__ import annotations

DESCRIPTION = "share of supervised tokens that are the model's first choice, given the true ones before"
COMPUTED_FROM = "loss"
HIGHER_IS_BETTER = True


def from_sums(loss_sum: float, correct_tokens: int, supervised_tokens: int) -> float:
    """correct_tokens / supervised_tokens, 0 to 1. Raises ValueError without tokens."""
    if supervised_tokens <= 0:
        raise ValueError("no supervised tokens")
    return correct_tokens / supervised_tokens
