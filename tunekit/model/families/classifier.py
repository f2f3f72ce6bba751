"""Sequence classifiers: an encoder or a decoder with one row of logits per text.

Comes in: a net as transformers builds it.  Goes out: `ClassifierFamily`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunekit.contracts import Stages
from tunekit.errors import ModelError
from tunekit.model.families.causal import Family
from tunekit.model.families.heads import TextHead
from tunekit.model.families.seq2seq import Seq2SeqFamily
from tunekit.model.families.structure import base_name


@dataclass(frozen=True)
class ClassifierFamily(Family):
    """Tokens in, logits (B, C) out, C labels. The head may be a small network, and reads one position of each row."""

    name: str = "classifier"
    task_type: str = "SEQ_CLS"
    text: str = "sequence classifier"
    answers: bool = False

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def layers(self, net: nn.Module) -> list[tuple[str, nn.Module]]:
        """The layers in order, of an encoder-decoder both stacks', with their module names."""
        config: Any = net.config
        both = getattr(config, "is_encoder_decoder", False)
        return Seq2SeqFamily().layers(net) if both else super().layers(net)

    def logits(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, C). Raises: ModelError where a decoder could not tell padding from text."""
        config: Any = net.config
        rows = next(iter(inputs.values())).shape[0]
        last_position = isinstance(getattr(net, "score", None), nn.Module)  # of decoders: the last that is no padding
        if rows > 1 and last_position and getattr(config, "pad_token_id", None) is None:
            raise ModelError(
                f"{config.model_type} reads the last token of each row, and its configuration names no padding token",
                "write pad_token_id into the base's config.json",
            )
        return super().logits(net, inputs)

    def head(self, net: nn.Module) -> TextHead:
        """None that turns every hidden state into logits. Raises: ModelError."""
        raise ModelError(f"{type(net).__name__} gives one row of logits per text, none per token", "read its logits")

    def head_name(self, net: nn.Module) -> str | None:
        """Module name of what stands beside the base and ends in one number per label."""
        labels, base = int(net.config.num_labels), base_name(net)  # type: ignore[union-attr,arg-type]
        for name, module in net.named_children():
            outputs = [getattr(inner, "out_features", None) for inner in module.modules()]
            if name != base and labels in outputs:
                return name
        return None

    def stages(self, net: nn.Module) -> Stages | None:
        """None: what follows the layers is not a norm alone."""
        return None
