"""The loss of reward models: the better of two answers should get the higher score.

Source: Bradley and Terry 1952. Names and formulas are the same as in trl 1.16. The lowest and the highest score of a
batch are not logged, because they are not sums over pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunekit.contracts import Batch, Model, ModelOutput, Sums
from tunekit.data.batching.pad import lay_end_to_end, positions
from tunekit.errors import ModelError
from tunekit.machine.placing import to_device
from tunekit.objectives.losses.answers import AnswerLoss
from tunekit.objectives.losses.logprobs import logits_at
from tunekit.objectives.losses.pairs import reward_sums
from tunekit.objectives.rows.answers import last_token
from tunekit.recipe.objectives.reward import SCORES


@dataclass(frozen=True)
class ScoreLoss(AnswerLoss):
    """loss = sum over pairs of -log s(c - r - margin) + coefficient (c + r)^2. c and r are the scores of the chosen
    and the rejected answer, and s is the logistic function."""

    coefficient: float = 0.0
    metrics: Sequence[str] = ("loss", *SCORES)
    logged: Sequence[str] = SCORES

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """The loss of each pair, shape (P,), and the logged values, summed over pairs."""
        chosen, rejected = scores_at(output, batch.targets["last"]).view(2, -1)
        margin = to_device(batch.targets["margin"], chosen.device)[:, 0]
        losses = -logsigmoid(chosen - rejected - margin) + self.coefficient * (chosen + rejected) ** 2
        return losses, reward_sums(chosen.detach(), rejected.detach())


def score_sequences(pad_id: int, model: Model, sequences: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """The score of each sequence of ids."""
    scores: list[float] = []
    for start in range(0, len(sequences), batch_size):
        lines = [np.asarray(ids, np.int32) for ids in sequences[start : start + batch_size]]
        ids = lay_end_to_end([[line] for line in lines], pad_id)  # (B, T)
        last = torch.tensor([number * ids.shape[1] + last_token(line, pad_id) for number, line in enumerate(lines)])
        output = model.output({"input_ids": ids, "position_ids": positions([[len(line)] for line in lines])})
        scores += scores_at(output, last).tolist()
    return scores


def scores_at(output: ModelOutput, last: Tensor) -> Tensor:
    """The scores at the last token of each answer.

    Shapes: output.hidden (B, T, D), last (N,) into its flattened positions -> (N,) float32. Raises: ModelError if the
    model is an encoder.
    """
    if output.hidden is None:
        what = "the base is an encoder, whose head cannot score each answer of a pair separately"
        raise ModelError(what, "choose a decoder model", key="model.name_or_path")
    return logits_at(output, last)[:, 0]
