"""Mean log-probability of the preferred answers."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean log-probability of the preferred answers"
NEEDS = ("logps_chosen", "units")
HIGHER_IS_BETTER = True
from_sums = mean_of("logps_chosen")
