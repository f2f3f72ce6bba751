"""Mean reward of the completions to the evaluation rows, one greedy one each, from its sum."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of greedy completions"
NEEDS = ("reward", "units")
HIGHER_IS_BETTER = True
from_sums = mean_of("reward")
