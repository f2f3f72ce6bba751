"""Token classifiers: an encoder or a decoder with one row of logits per token.

Comes in: a net as transformers builds it.  Goes out: `TokenClassifierFamily`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunekit.contracts import Stages
from tunekit.model.families.causal import Family
from tunekit.model.families.classifier import ClassifierFamily


@dataclass(frozen=True)
class TokenClassifierFamily(ClassifierFamily):
    """Tokens in, logits (B, T, C) out, C labels."""

    name: str = "token_classifier"
    task_type: str | None = "TOKEN_CLS"
    text: str = "a token classifier"

    def auto_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def reads_rows(self, net: nn.Module) -> bool:
        """Always: what stands between the last layer and the scores, such as dropout, differs from net to net."""
        return True

    def logits(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, C). A decoder needs no mask, since padding comes last, and tells rows of one line apart by their
        positions; an encoder counts positions itself: some begin at another number than 0."""
        left_out = "attention_mask" if self.decoder(net) else "position_ids"
        return Family.logits(self, net, {name: value for name, value in inputs.items() if name != left_out})

    def scores(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(T, C) float32."""
        return super().scores(net, inputs)[0]

    def stages(self, net: nn.Module) -> Stages | None:
        """None: what follows the layers is not a norm alone."""
        return None
