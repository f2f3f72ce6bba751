"""Knowledge distillation: the divergence between the next-token distributions of student and teacher.

Unlike in trl, the tokens come from the data, and are not sampled from the student. kd_ratio is defined as in
torchtune.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.contracts import Batch, Companion, Counts, Loss, LossKind, ModelOutput, Read, RunView, StepBatches, Sums
from tunekit.machine.placing import to_device
from tunekit.objectives.losses.logprobs import divergences, hidden_at, loss_of_positions, sums_of_positions
from tunekit.objectives.losses.row_sums import loss_sums
from tunekit.objectives.losses.tokens import TokenLoss, next_tokens
from tunekit.recipe.objectives.distill import DistillSettings

HIDDEN = "teacher"  # part of a prepared row, (N, D): the teacher's last hidden states at the supervised tokens


class Teacher(Companion):
    """The companion of this loss: a frozen model. The loss gets its `head` as ModelOutput.companion_head."""

    def score(self, run: RunView, batches: Sequence[Batch], read: Read, counts: Counts | None = None) -> list[Tensor]:
        """Like `run.score`, but with the teacher."""
        raise NotImplementedError


@dataclass(frozen=True)
class DivergenceLoss(LossKind):
    """loss = sum over supervised tokens of w (k D(teacher, student) - (1 - k) log p(token)), k = kd_ratio; divided by
    the step's sum of w, the token weights.

    D: KL(t | s) at beta 0, KL(s | t) at beta 1, else beta KL(t | m) + (1 - beta) KL(s | m), m = (1 - beta) s + beta t.
    t and s are the teacher's and the student's distributions at `temperature`.    Source: Agarwal et al. 2024, eq. 1.
    """

    settings: DistillSettings
    metrics: Sequence[str] = ("loss", "token_accuracy")

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        """Add the teacher's last hidden states to each row of the step. From these the loss computes the teacher's
        logits, in chunks. The teacher reads each row as a separate sequence, so that packed documents need no mask."""
        alone = [run.rows.collate([[row] for row in batch.rows]) for batch in step.batches]
        hidden = run.companion(Teacher).score(run, alone, _supervised_hidden, _supervised_counts)
        parts = []
        for batch, states in zip(step.batches, hidden, strict=True):
            of_rows = torch.split(_raw(states), _supervised_counts(batch))
            parts.append({HIDDEN: [part.numpy() for part in of_rows]})
        return run.rows.with_parts(step, parts)

    def units(self, batch: Batch) -> Tensor:
        """The sum of the supervised tokens' weights, shape (1,) float64."""
        return TokenLoss().units(batch)

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum over tokens. Shapes: output.hidden (B, T, D) -> total (1,)."""
        index, targets, weights = next_tokens(batch)
        share = self.settings.kd_ratio
        total = share * self._divergences(output, batch).sum()[None]
        if share < 1:
            total = total + (1 - share) * loss_of_positions(output, index, targets, weights).total
        return Loss(total)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums over tokens: `loss`, `correct` (tokens predicted right) and `units` (all tokens). Tokens count with
        their weights."""
        sums, share = sums_of_positions(output, *next_tokens(batch), batch), self.settings.kd_ratio
        values = self._divergences(output, batch)  # (N,)
        return sums | {
            name: share * value + (1 - share) * sums[name] for name, value in loss_sums(values, batch).items()
        }

    def _divergences(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The divergence at each supervised token, times the token's weight, shape (N,)."""
        settings, (index, _, weights) = self.settings, next_tokens(batch)
        assert output.companion_head is not None
        values = divergences(
            output,
            index,
            _read(batch.targets[HIDDEN]),
            output.companion_head,
            beta=settings.beta,
            temperature=settings.temperature,
        )
        return values if weights is None else values * to_device(weights, values.device)


def _supervised_hidden(output: ModelOutput, batch: Batch) -> Tensor:
    return hidden_at(output, next_tokens(batch)[0])


def _supervised_counts(batch: Batch) -> list[int]:
    return [row.supervised for row in batch.rows]


def _raw(hidden: Tensor) -> Tensor:
    """The same tensor in a dtype that numpy has: bfloat16 is viewed as int16."""
    return hidden.view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden


def _read(hidden: Tensor) -> Tensor:
    return hidden.view(torch.bfloat16) if hidden.dtype == torch.int16 else hidden
