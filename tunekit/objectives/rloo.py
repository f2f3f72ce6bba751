"""`objective: rloo`: the reward of a completion less the mean reward of the others to its prompt."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.rloo import LeaveOneOut
from tunekit.objectives.losses.samples import sampled_objective
from tunekit.recipe.objectives.rloo import RlooSettings


def make(settings: RlooSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Prompts whose completions are compared with the others of their group."""
    return sampled_objective(LeaveOneOut.of(settings, tokenizer), options)
