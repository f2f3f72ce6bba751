"""Supervised fine-tuning: next-token cross entropy on the supervised tokens of causal models.

Comes in: a Batch and the model's last hidden states.  Goes out: Loss (sum over supervised tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tunekit.contracts import Batch, Head, Loss
from tunekit.model.placing import placed
from tunekit.objectives.base import Supervised
from tunekit.objectives.logprobs import loss_of_positions, supervised_positions
from tunekit.recipe.objectives.sft import SftSettings


class Sft(Supervised):
    """loss = sum over supervised tokens of -log p(token | tokens before it); divided by the step's number of them."""

    family = SftSettings.family
    packable = True

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """No attention mask: padding comes last, and position ids alone keep packed rows apart."""
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}

    def loss(self, output: Tensor, head: Head, batch: Batch, head_parameters: Sequence[Tensor] = ()) -> Loss:
        """Shapes: output (B, T, D) -> total (1,). Without gradient, metrics also count `correct` tokens."""
        index, targets = (placed(part, output.device) for part in supervised_positions(batch.labels))
        return loss_of_positions(output, index, targets, head, self.logits_chunk_tokens, head_parameters)


def make(settings: SftSettings, logits_chunk_tokens: int) -> Sft:
    """The objective of `objective: sft`."""
    return Sft(logits_chunk_tokens)
