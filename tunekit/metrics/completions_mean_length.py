"""Mean number of tokens of the completions to the evaluation rows."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean number of tokens of greedy completions"
NEEDS = ("completions_mean_length", "units")
HIGHER_IS_BETTER = False
from_sums = mean_of("completions_mean_length")
