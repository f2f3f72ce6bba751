"""Supervised fine-tuning of encoder-decoders: cross entropy on the answer, given what the encoder read.

Comes in: a Batch whose rows are source, start of the answer, answer, and the decoder's last hidden states.
Goes out: Loss (sum over the answers' tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tunekit.contracts import IGNORED, Batch, Head, Loss
from tunekit.model.placing import placed
from tunekit.objectives.base import Supervised
from tunekit.objectives.logprobs import loss_of_positions
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings


class Parts(NamedTuple):
    """A batch cut in two, each part padded on the right by itself. S: source tokens; A: the longest answer's."""

    source: Tensor  # (B, S) int64
    source_mask: Tensor  # (B, S) int64, 0 at padding
    decoder_ids: Tensor  # (B, A) int64: the start of the answer, then all of it but its last token
    labels: Tensor  # (B, A) int64: position a predicts labels[a]; IGNORED at padding


def parts_of(batch: Batch) -> Parts:
    """Source and answer of each row; the answer is all that is trained on."""
    ids, labels = batch.input_ids, batch.labels
    starts = (labels != IGNORED).int().argmax(dim=1) - 1  # (B,), where the answer begins
    lengths = torch.tensor(batch.lengths)  # (B,)
    source_places = torch.arange(int(starts.max()))[None]  # (1, S)
    source_mask = source_places < starts[:, None]  # (B, S)
    answer_places = torch.arange(int((lengths - starts).max()) - 1)[None]  # (1, A)
    places = (starts[:, None] + answer_places).clamp(max=ids.shape[1] - 2)  # (B, A)
    real = answer_places < (lengths - starts - 1)[:, None]  # (B, A)
    return Parts(
        source=ids[:, : source_mask.shape[1]].contiguous(),  # what follows a short source is masked
        source_mask=source_mask.long(),
        decoder_ids=ids.gather(1, places),  # what follows a short answer comes after every real position
        labels=labels.gather(1, places + 1).masked_fill(~real, IGNORED),
    )


class Seq2seq(Supervised):
    """loss = sum over the answers' tokens of -log p(token | source, tokens before it); divided by the step's number."""

    family = Seq2seqSettings.family
    packable = False

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The source with its mask, and the answer so far; that needs none, since padding comes last."""
        parts = parts_of(batch)
        return {
            "input_ids": parts.source,
            "attention_mask": parts.source_mask,
            "decoder_input_ids": parts.decoder_ids,
        }

    def loss(self, output: Tensor, head: Head, batch: Batch, head_parameters: Sequence[Tensor] = ()) -> Loss:
        """Shapes: output (B, A, D) -> total (1,). Without gradient, metrics also count `correct` tokens."""
        labels = parts_of(batch).labels  # (B, A)
        index = torch.nonzero(labels.flatten() != IGNORED)[:, 0]  # (N,)
        index, targets = (placed(part, output.device) for part in (index, labels.flatten()[index]))
        return loss_of_positions(output, index, targets, head, self.logits_chunk_tokens, head_parameters)


def make(settings: Seq2seqSettings, logits_chunk_tokens: int) -> Seq2seq:
    """The objective of `objective: seq2seq`."""
    return Seq2seq(logits_chunk_tokens)
