"""Mean reward of the completions to the evaluation rows, one greedy one each, from its sum."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of greedy completions"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("reward")
