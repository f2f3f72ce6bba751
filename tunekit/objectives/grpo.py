"""`objective: grpo`: of its own completions to a prompt, the model learns those of higher reward."""

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.losses.advantages import CLIPPED
from tunekit.objectives.losses.grpo import GroupRelative
from tunekit.objectives.losses.samples import sampled_objective
from tunekit.recipe.objectives.grpo import GrpoSettings


def make(settings: GrpoSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Prompts whose completions are compared with their group."""
    clipped = ("cispo_clip_ratio",) if settings.loss_type == "cispo" else CLIPPED
    return sampled_objective(GroupRelative.of(settings, tokenizer, clipped), options)
