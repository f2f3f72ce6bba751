"""Mean reward of one greedy completion for each evaluation row."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "mean reward of greedy completions"
HIGHER_IS_BETTER = True
NEEDS, from_sums = mean_of("reward")
