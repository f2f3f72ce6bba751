"""Mean log-ratio of policy and reference on answers to other prompts, as the objective kto estimates it."""

from __future__ import annotations

from tunekit.metrics.loss import mean_of

DESCRIPTION = "estimated KL of the policy from the reference, not below 0"
NEEDS = ("kl", "units")
HIGHER_IS_BETTER = False
from_sums = mean_of("kl")
