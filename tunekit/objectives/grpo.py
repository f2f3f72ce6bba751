"""`objective: grpo`: reinforcement learning. The model writes completions and learns to prefer those with higher
rewards."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.advantages import CLIPPED
from tunekit.objectives.losses.grpo import GroupRelative
from tunekit.objectives.losses.samples import sampled_objective
from tunekit.recipe.objectives.grpo import GrpoSettings


def make(settings: GrpoSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are prompts; the loss compares each completion with the other completions of its
    prompt."""
    clipped = ("cispo_clip_ratio",) if settings.loss_type == "cispo" else CLIPPED
    return sampled_objective(GroupRelative.of(settings, tokenizer, clipped), options)
