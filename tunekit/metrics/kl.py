"""KTO's estimate of the KL: the mean log-ratio of policy to reference, for prompts paired with answers of other
rows."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "estimated KL of the policy from the reference, not below 0"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("kl")
