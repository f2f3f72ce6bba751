"""Encoder-decoders: T5, BART and whatever is built like them.

Comes in: a net as transformers builds it.  Goes out: `Seq2SeqFamily`.  Next: load.py and sample.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunekit.errors import ModelError
from tunekit.model.families.causal import Family
from tunekit.model.families.structure import call_accepted, last_hidden, name_of
from tunekit.protocols import Stages

OF_DECODER = "decoder_"


@dataclass(frozen=True)
class Seq2SeqFamily(Family):
    """Tokens of the source in (input_ids, attention_mask), those of the answer so far (decoder_input_ids,
    decoder_attention_mask), each also as embeddings; hidden states are the decoder's, a head (D) -> (V)."""

    name: str = "seq2seq"
    task_type: str = "SEQ_2_SEQ_LM"
    text: str = "encoder-decoder"
    reads_source: bool = True

    def auto_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def layers(self, net: nn.Module) -> list[tuple[str, nn.Module]]:
        """The encoder's layers in order, then the decoder's, with their module names."""
        return [
            (f"{name_of(net, stack)}.{own}.{index}", layer)
            for stack in _stacks(net)
            for own, layers in [_layer_list(stack)]
            for index, layer in enumerate(layers)
        ]

    def hidden(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, D) of the decoder after its final norm; no head, no cache, no full logits."""
        encoder, decoder = _stacks(net)
        of_source = {key: value for key, value in inputs.items() if not key.startswith(OF_DECODER)}
        source = last_hidden(call_accepted(encoder, of_source))  # (B, S, D)
        of_answer = {key.removeprefix(OF_DECODER): v for key, v in inputs.items() if key.startswith(OF_DECODER)}
        of_answer["encoder_hidden_states"] = source
        if "attention_mask" in inputs:
            of_answer["encoder_attention_mask"] = inputs["attention_mask"]
        return last_hidden(call_accepted(decoder, of_answer))

    def takes_positions(self, net: nn.Module) -> bool:
        """Never: an answer of a packed row would see the sources of the others."""
        return False

    def stages(self, net: nn.Module) -> Stages | None:
        """None: two stacks are not one list of layers."""
        return None


def _stacks(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder."""
    holder: Any = net
    return holder.get_encoder(), holder.get_decoder()


def _layer_list(stack: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of layers that a stack holds, with its name there."""
    for name, module in stack.named_children():
        if isinstance(module, nn.ModuleList) and len(module):
            return name, module
    raise ModelError(f"{type(stack).__name__} has no list of layers", "choose an encoder-decoder such as T5 or BART")
