"""KTO's estimate of the KL of policy from reference: the mean log-ratio of their probabilities, for prompts combined
with answers of other rows."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "estimated KL of the policy from the reference, at least 0"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("kl")
