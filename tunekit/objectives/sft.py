"""Supervised fine-tuning: next-token cross entropy on the supervised tokens of causal models.

Comes in: a Batch and the model's last hidden states.  Goes out: Loss (sum over supervised tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunekit.model.placing import placed
from tunekit.objectives.logprobs import score, supervised_positions
from tunekit.protocols import Batch, Head, Loss, Window
from tunekit.recipe.objectives.sft import SftSettings


class Sft:
    """loss = sum over supervised tokens of -log p(token | tokens before it); divided by the step's number of them."""

    family = SftSettings.family
    packable = True
    needs_reference = False

    def __init__(self, logits_chunk_tokens: int) -> None:
        self.logits_chunk_tokens = logits_chunk_tokens

    def prepare(self, model: object, window: Window) -> Window:
        """Nothing to prepare."""
        return window

    def units(self, batch: Batch) -> Tensor:
        """(1,) float64: supervised tokens that are predicted; a row's first token never is."""
        return torch.tensor([float(len(supervised_positions(batch.labels)[0]))], dtype=torch.float64)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """No attention mask: padding comes last, and position ids alone keep packed rows apart."""
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}

    def loss(self, output: Tensor, head: Head, batch: Batch, head_parameters: Sequence[Tensor] = ()) -> Loss:
        """Shapes: output (B, T, D) -> total (1,). Without gradient, metrics also count `correct` tokens."""
        index, targets = (placed(part, output.device) for part in supervised_positions(batch.labels))
        return score(output, index, targets, head, self.logits_chunk_tokens, head_parameters)


def make(settings: SftSettings, logits_chunk_tokens: int) -> Sft:
    """The objective of `objective: sft`."""
    return Sft(logits_chunk_tokens)
