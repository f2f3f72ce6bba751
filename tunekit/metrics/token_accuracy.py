"""Share of supervised tokens that are the model's first choice, given the true tokens before them."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of supervised tokens that are the model's first choice, given the true ones before"
NEEDS = ("correct", "units")
HIGHER_IS_BETTER = True
from_sums = mean_of("correct")
