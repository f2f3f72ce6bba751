"""Mean log-ratio of policy to reference on answers to other prompts, which is KTO's estimate of the KL."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "estimated KL of the policy from the reference, not below 0"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("kl")
