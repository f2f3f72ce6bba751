"""Mean negative log-likelihood of the supervised tokens, from its sum."""

from __future__ import annotations

DESCRIPTION = "mean negative log-likelihood of the supervised tokens"
COMPUTED_FROM = "loss"
HIGHER_IS_BETTER = False


def from_sums(loss_sum: float, correct_tokens: int, supervised_tokens: int) -> float:
    """loss_sum / supervised_tokens, in nats a token. Raises ValueError without tokens."""
    if supervised_tokens <= 0:
        raise ValueError("no supervised tokens")
    return loss_sum / supervised_tokens
