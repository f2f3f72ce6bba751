"""`objective: reward`: a reward model, which learns to give the better of two answers the higher score."""

from dataclasses import replace
from functools import partial

from tunekit.contracts import Answering, EncodeOptions, Facts, Labels, Objective, Tokenizer
from tunekit.objectives.losses.reward import ScoreLoss, score_sequences
from tunekit.objectives.rows.answers import pair_rows
from tunekit.objectives.rows.labels import headed_section
from tunekit.recipe.objectives.reward import RewardSettings

LABEL = "LABEL_0"  # transformers' name for the one score of a head


def make(settings: RewardSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are pairs of answers; the loss reads their scores. `facts`: values saved with a trained
    adapter, or facts of the base. They contain the labels of the head, if there is one."""
    head = facts.get("labels") or facts.get("head", ())
    labels = tuple(head) if len(head) == 1 else (LABEL,)
    return Objective(
        settings.method,
        settings.family,
        replace(pair_rows(settings, tokenizer, options), further={"margin": "<f4"}, scored=True),
        ScoreLoss(settings.center_rewards_coefficient or 0.0),
        Answering("score", score=partial(score_sequences, tokenizer.pad_id)),
        section=partial(headed_section, settings.family, Labels(labels, tuple(head), tokenizer.pad_id), None),
        facts={"labels": list(labels)},
    )
