"""Share of the completions for evaluation rows that reached max_completion_length."""

from tunekit.metrics.loss import mean_of

DESCRIPTION = "share of greedy completions that did not end by themselves"
HIGHER_IS_BETTER = False
NEEDS, from_sums = mean_of("completions_clipped_ratio")
