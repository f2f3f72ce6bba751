"""Sums over metrics.jsonl, so that a resumed run reports all its legs and not only the last.

Comes in: records as metrics_log.py reads them.  Goes out: `Totals`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Totals:
    """Of all steps: tokens without padding, loss tokens, seconds inside steps, and the loss of each step in order."""

    steps: int
    tokens: int
    supervised_tokens: int
    seconds: float
    losses: tuple[float, ...]
    evaluations: tuple[dict[str, Any], ...]

    @property
    def first_loss(self) -> float | None:
        """Mean loss over the first tenth of the steps, since single ones are noisy; None where there are none."""
        return fmean(self.losses[: self._tenth]) if self.losses else None

    @property
    def final_loss(self) -> float | None:
        """Mean loss over the last tenth of the steps; None where there are none."""
        return fmean(self.losses[-self._tenth :]) if self.losses else None

    @property
    def _tenth(self) -> int:
        return -(-len(self.losses) // 10)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens without padding per second spent in steps; None where no time was measured."""
        return self.tokens / self.seconds if self.seconds > 0 else None

    @property
    def supervised_tokens_per_second(self) -> float | None:
        """Loss tokens per second spent in steps; None where no time was measured."""
        return self.supervised_tokens / self.seconds if self.seconds > 0 else None


def sum_metrics(records: Iterable[Mapping[str, Any]]) -> Totals:
    """Add up the records of all legs of a run."""
    steps: list[Mapping[str, Any]] = []
    evaluations: list[Mapping[str, Any]] = []
    for record in records:
        (evaluations if "eval" in record else steps).append(record)
    return Totals(
        steps=len(steps),
        tokens=sum(record["tokens"] for record in steps),
        supervised_tokens=sum(record["supervised_tokens"] for record in steps),
        seconds=sum(record["seconds"] for record in steps),
        losses=tuple(record["loss"] for record in steps),
        evaluations=tuple(dict(record) for record in evaluations),
    )
