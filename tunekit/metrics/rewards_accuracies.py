"""Share of pairs whose preferred answer has the higher reward."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of pairs whose preferred answer has the higher reward"
NEEDS = ("rewards_accuracies", "units")
HIGHER_IS_BETTER = True
from_sums = mean_of("rewards_accuracies")
