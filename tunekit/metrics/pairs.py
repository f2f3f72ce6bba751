"""Metrics that are a mean over pairs of an answer and its reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MeanOfPairs:
    """The function `score` of a metric: the mean of `of_pair`(answer, reference) over all pairs."""

    of_pair: Callable[[str, str], float]

    def of_each(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """The score of each pair. Raises: ValueError if the lengths differ."""
        return [float(self.of_pair(*pair)) for pair in zip(predictions, references, strict=True)]

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        """The mean over all pairs. Raises: ValueError if there are no pairs, or if the lengths differ."""
        scores = self.of_each(predictions, references)
        if not scores:
            raise ValueError("no answers to compare")
        return sum(scores) / len(scores)
