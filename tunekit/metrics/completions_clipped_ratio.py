"""Share of the completions to the evaluation rows that reached max_completion_length."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of greedy completions that did not end by themselves"
NEEDS = ("completions_clipped_ratio", "units")
HIGHER_IS_BETTER = False
from_sums = mean_of("completions_clipped_ratio")
