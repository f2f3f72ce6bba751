"""Metrics that are a mean over pairs of answer and reference."""

from collections.abc import Callable, Sequence


def mean_of_pairs(of_pair: Callable[[str, str], float]) -> Callable[[Sequence[str], Sequence[str]], float]:
    """The function `score` of a metric that is the mean of `of_pair`(answer, reference)."""

    def score(predictions: Sequence[str], references: Sequence[str]) -> float:
        """The mean over all pairs. Raises: ValueError without pairs, or if the lengths differ."""
        scores = [of_pair(*pair) for pair in zip(predictions, references, strict=True)]
        if not scores:
            raise ValueError("no answers to compare")
        return sum(scores) / len(scores)

    return score
