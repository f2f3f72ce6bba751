"""Knowledge distillation: on the supervised tokens of the data the student learns a teacher's distribution.

Comes in: examples, then a Batch and the model's output.  Goes out: rows, then Loss (sum over supervised tokens).
Source: Hinton et al. 2015; the divergences are those of Agarwal et al. 2024 (GKD), eq. 1, as trl 1.16 computes them.
What differs from trl by design: the tokens are the data's own, not samples of the student; kd_ratio is torchtune's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Batch, Gather, Loss, ModelOutput, Row, Sums, Tokenizer, Window
from tunekit.files.cache_folder import hash_of
from tunekit.machine.devices import summing_dtype
from tunekit.machine.placing import placed
from tunekit.objectives.logprobs import divergences, hidden_at, loss_of_positions, row_losses, sums_of_positions
from tunekit.objectives.sft import Sft, supervised
from tunekit.recipe.objectives.distill import DistillSettings

TAUGHT = "teacher"  # the part of a prepared row: the teacher's last hidden states at its supervised tokens, (N, D)


class Distill(Sft):
    """loss = sum over supervised tokens of w (k D(teacher, student) - (1 - k) log p(token)), k = kd_ratio; divided by
    the sum of the step's w, as sft does.

    D is the divergence of the distributions over the next token: KL(t | s) at beta 0, KL(s | t) at beta 1, else
    beta KL(t | m) + (1 - beta) KL(s | m), m = (1 - beta) s + beta t; both at `temperature`.
    """

    metrics: Sequence[str] = ("loss", "token_accuracy")

    def __init__(self, settings: DistillSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.settings = settings
        self.fingerprint = hash_of([settings.method, tokenizer.fingerprint])  # rows are the same whoever teaches

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Each row with the teacher's last hidden states: its logits are made where the loss reads them, in chunks.

        The teacher reads each row by itself, so that it need not keep documents of one sequence apart.
        """
        alone = [self.collate([[row] for row in batch.rows]) for batch in window.batches]
        found = model.teacher.scored(alone, lambda output, batch: hidden_at(output, supervised(batch)[0]))
        return replace(window, batches=tuple(self._taught(*pair) for pair in zip(window.batches, found, strict=True)))

    def _taught(self, batch: Batch, hidden: Tensor) -> Batch:
        """Shapes: hidden (N, D), of the supervised tokens of all rows."""
        parts = iter(torch.split(_raw(hidden), [row.supervised for row in batch.rows]))
        rows = [
            [replace(row, parts={**row.parts, TAUGHT: next(parts).numpy()}) for row in sequence]
            for sequence in batch.sequences
        ]
        return self.collate(rows)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """As sft; of prepared rows also what the teacher gave, (N, D)."""
        batch = super().collate(sequences)
        if TAUGHT in batch.rows[0].parts:
            batch.targets[TAUGHT] = torch.from_numpy(np.concatenate([row.parts[TAUGHT] for row in batch.rows]))
        return batch

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, T, D) -> total (1,)."""
        index, targets, weights = supervised(batch)
        share = self.settings.kd_ratio
        found = self._divergences(output, index, batch)  # (N,)
        total = share * (found if weights is None else found * placed(weights, found.device)).sum()[None]
        if share < 1:
            total = total + (1 - share) * loss_of_positions(output, index, targets, weights).total
        return Loss(total)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, correct and units, over tokens."""
        index, targets, weights = supervised(batch)
        sums, share = sums_of_positions(output, index, targets, weights, batch), self.settings.kd_ratio
        found = self._divergences(output, index, batch)  # (N,)
        found = found if weights is None else found * placed(weights, found.device)
        divergence = {"loss": found.sum(dtype=summing_dtype(found.device)), **row_losses(found, batch)}
        return sums | {name: share * value + (1 - share) * sums[name] for name, value in divergence.items()}

    def _divergences(self, output: ModelOutput, index: Tensor, batch: Batch) -> Tensor:
        taught, beta = batch.targets[TAUGHT], self.settings.beta
        return divergences(output, index, _read(taught), beta=beta, temperature=self.settings.temperature)


def _raw(hidden: Tensor) -> Tensor:
    """bfloat16 as the int16 of the same bits: numpy has no such numbers."""
    return hidden.view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden


def _read(hidden: Tensor) -> Tensor:
    return hidden.view(torch.bfloat16) if hidden.dtype == torch.int16 else hidden


def make(settings: DistillSettings, processor: Tokenizer, facts: Mapping[str, Any]) -> Distill:
    """The objective of `objective: distill`."""
    return Distill(settings, processor)
