"""Sequence classifiers: an encoder or a decoder with one row of logits per text.

Comes in: a net as transformers builds it.  Goes out: `ClassifierFamily`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    task_type: str | None = "SEQ_CLS"
    text: str = "a sequence classifier"
    answers: bool = False

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def decoder(self, net: nn.Module) -> bool:
        """Whether the net is a decoder, whose head reads the last token of a row."""
        return isinstance(getattr(net, "score", None), nn.Module)

    def looks_back(self, net: nn.Module) -> bool:
        return self.decoder(net)

    def takes_positions(self, net: nn.Module) -> bool:
        return self.decoder(net) and super().takes_positions(net)

    def reads_rows(self, net: nn.Module) -> bool:
        """Of encoders and encoder-decoders, whose heads differ from net to net."""
        return not self.decoder(net)

    def trained_with(self, net: nn.Module) -> list[str]:
        """The head."""
        name = self.head_name(net)
        return [] if name is None else [name]

    def facts(self, net: nn.Module) -> dict[str, Any]:
        """The labels of the net's own head."""
        config: Any = net.config
        return {"labels": [str(label) for _, label in sorted(config.id2label.items())]}

    def inputs_of(self, ids: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        return {"input_ids": ids}

    def scores(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.logits(net, inputs).float()

    def layers(self, net: nn.Module) -> list[tuple[str, nn.Module]]:
        """The layers in order, of an encoder-decoder both stacks', with their module names."""
        config: Any = net.config
        both = getattr(config, "is_encoder_decoder", False)
        return Seq2SeqFamily().layers(net) if both else super().layers(net)

    def logits(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, C). An encoder counts positions itself: some begin at another number than 0.

        Raises: ModelError where a decoder could not tell padding from text.
        """
        config: Any = net.config
        rows = next(iter(inputs.values())).shape[0]
        if rows > 1 and self.decoder(net) and getattr(config, "pad_token_id", None) is None:
            raise ModelError(
                f"{config.model_type} reads the last token of each row, and its configuration names no padding token",
                "write pad_token_id into the base's config.json",
            )
        return super().logits(net, {name: value for name, value in inputs.items() if name != "position_ids"})

    def hidden(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, D) of a decoder after its final norm; padding comes last, so that none of it is seen."""
        return super().hidden(net, {name: value for name, value in inputs.items() if name != "attention_mask"})

    def head(self, net: nn.Module) -> TextHead:
        """Of a decoder: hidden states (D) -> scores (C). Raises: ModelError for others."""
        if not self.decoder(net):
            raise ModelError(
                f"{type(net).__name__} gives one row of logits per text, none per token", "read its logits"
            )
        return TextHead(net, "score")

    def head_name(self, net: nn.Module) -> str | None:
        """Module name of what stands beside the base and ends in one number per label."""
        labels, base = int(net.config.num_labels), base_name(net)  # type: ignore[union-attr,arg-type]
        for name, module in net.named_children():
            outputs = [getattr(inner, "out_features", None) for inner in module.modules()]
            if name != base and labels in outputs:
                return name
        return None

    def stages(self, net: nn.Module) -> Stages | None:
        """Of decoders as of causal models; None of others: what follows their layers is not a norm alone."""
        return super().stages(net) if self.decoder(net) else None
