"""Reward model: a score for each answer, by which the preferred one of two is to be the higher.

Comes in: preference pairs, then a Batch and the model's output.  Goes out: rows, then Loss (sum over pairs).
Source: Bradley and Terry 1952; names and formulas are those of trl 1.16.  The score is read where transformers reads
it: at the last token of a row that is not its padding token.  Not logged, for they are no sums over pairs: the least
and the highest score of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunekit.contracts import GREEDY, Batch, ModelOutput, Part, Row, Sampling, Sums, Tokenizer
from tunekit.data.batching.pad import lay_end_to_end, positions
from tunekit.errors import InputError, ModelError
from tunekit.machine.placing import placed
from tunekit.objectives.answers import AnswerObjective, Places
from tunekit.objectives.pairs import SIDES, reward_sums
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.recipe.objectives.reward import SCORES, RewardSettings

LABEL = "LABEL_0"  # as transformers calls the one score of a head


class Reward(AnswerObjective):
    """loss = sum over pairs of -log s(c - r - margin) + coefficient (c + r)^2; c and r are the scores of both answers,
    s the logistic function."""

    sides, unusable_key = SIDES, "unusable_pairs"
    beside: Mapping[str, str] = {"margin": "<f4"}
    metrics: Sequence[str] = ("loss", *SCORES)
    logged: Sequence[str] = SCORES

    def __init__(self, settings: RewardSettings, tokenizer: Tokenizer, head: Sequence[str]) -> None:
        """`head`: labels of the rows of the base's own head, where it has one."""
        super().__init__(settings, tokenizer)
        self.coefficient, self.new_head = settings.center_rewards_coefficient or 0.0, len(head) > 1
        self.facts = {"labels": list(head) if len(head) == 1 else [LABEL]}

    def section(self, model: ModelSection, seed: int = 0) -> ModelSection:
        """The base with a head of one score: its own where it has such a one."""
        head = {"new_head": self.new_head, "head_seed": seed, "head_pad_id": self.tokenizer.pad_id}
        return HeadedModel.of(model, family=self.family, labels=tuple(self.facts["labels"]), **head)

    def targets(self, rows: Sequence[Row], places: Places, ids: Tensor) -> dict[str, Tensor]:
        """`last`: (2 P,) where the score of each chosen answer is read, then of each rejected one."""
        order = [(number, side) for side in self.sides for number in range(len(rows))]
        return {"last": torch.tensor([int(places[each][self._last(rows[each[0]].parts[each[1]])]) for each in order])}

    def _last(self, ids: Any) -> int:
        """The last place whose id is not the padding's."""
        return int(np.flatnonzero(np.asarray(ids) != self.tokenizer.pad_id).max(initial=0))

    def spans(self, row: Row) -> list[Part]:
        """Both sequences; no token of them is predicted."""
        return [replace(part, trained=np.zeros_like(part.trained)) for part in super().spans(row)]

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """(P,) loss of each pair, and sums over pairs of what is logged."""
        chosen, rejected = scores_at(output, batch.targets["last"]).view(2, -1)
        margin = placed(batch.targets["margin"], chosen.device)[:, 0]
        losses = -logsigmoid(chosen - rejected - margin) + self.coefficient * (chosen + rejected) ** 2
        return losses, reward_sums(chosen.detach(), rejected.detach())

    def score(self, model: Any, sequences: Sequence[Sequence[int]], batch_size: int) -> list[float]:
        """Of each sequence of ids."""
        found: list[float] = []
        for start in range(0, len(sequences), batch_size):
            lines = [np.asarray(ids, np.int32) for ids in sequences[start : start + batch_size]]
            ids = lay_end_to_end([[line] for line in lines], self.tokenizer.pad_id)  # (B, T)
            last = torch.tensor([number * ids.shape[1] + self._last(line) for number, line in enumerate(lines)])
            output = model.output({"input_ids": ids, "position_ids": positions([[len(line)] for line in lines])})
            found += scores_at(output, last).tolist()
        return found

    def answer(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int,
        template: str | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """Raises: InputError."""
        raise InputError("a reward model writes no answers, it scores them", "give answers with --score FILE")


def scores_at(output: ModelOutput, last: Tensor) -> Tensor:
    """Shapes: output.hidden (B, T, D), last (N,) into its flattened positions -> (N,) float32.

    Raises: ModelError for an encoder.
    """
    if output.hidden is None:
        what = "the base is an encoder, whose head reads whole rows and not each answer of a pair"
        raise ModelError(what, "choose a decoder", key="model.name_or_path")
    assert output.head is not None
    hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
    return output.head.logits(hidden.index_select(0, placed(last, hidden.device)))[:, 0]


def make(settings: RewardSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Reward:
    """The objective of `objective: reward`; facts are the labels of its head's rows, or of the base's."""
    return Reward(settings, processor, facts.get("labels") or facts.get("head", ()))
