"""Mean log-probability of the other answers."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean log-probability of the other answers"
NEEDS = ("logps_rejected", "units")
HIGHER_IS_BETTER = False
from_sums = mean_of("logps_rejected")
