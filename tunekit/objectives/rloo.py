"""`objective: rloo`: reinforcement learning. A completion's advantage is its reward minus the mean reward of the other
completions of its prompt."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.rloo import LeaveOneOut
from tunekit.objectives.losses.samples import sampled_objective
from tunekit.recipe.objectives.rloo import RlooSettings


def make(settings: RlooSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are prompts; the loss compares each completion with the other completions of its
    prompt."""
    return sampled_objective(LeaveOneOut.of(settings, tokenizer), options)
