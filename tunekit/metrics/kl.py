"""Mean log-ratio of policy and reference on answers to other prompts, as the objective kto estimates it."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "estimated KL of the policy from the reference, not below 0"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("kl")
