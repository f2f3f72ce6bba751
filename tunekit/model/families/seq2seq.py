"""Encoder-decoders: T5, BART and whatever is built like them.

Comes in: a net as transformers builds it.  Goes out: `Seq2SeqFamily`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tunekit.contracts import Stages
from tunekit.errors import ModelError
from tunekit.model.call import BETWEEN_STACKS, current_call, seed_layer
from tunekit.model.families.causal import Family
from tunekit.model.families.stages import is_proven, make_stack
from tunekit.model.families.structure import call_accepted, last_hidden, name_of, text_config

OF_DECODER = "decoder_"
FINISH = ("final_layer_norm", "layer_norm", "norm", "dropout")  # BART's dropout is a number, and for embeddings


@dataclass(frozen=True)
class Seq2SeqFamily(Family):
    """Tokens of the source in (input_ids, attention_mask), those of the answer so far (decoder_input_ids,
    decoder_attention_mask), each also as embeddings; source_rows (N,) where answers share sources. Hidden states are
    the decoder's, a head (D) -> (V)."""

    name: str = "seq2seq"
    task_type: str | None = "SEQ_2_SEQ_LM"
    text: str = "an encoder-decoder"
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
        source = last_hidden(_read(encoder, inputs))  # (B, S, D)
        rows = inputs.get("source_rows")
        if rows is not None:
            source, inputs = source[rows], {**inputs, "attention_mask": inputs["attention_mask"][rows]}  # (N, S, D)
        if torch.is_grad_enabled():
            seed_layer(current_call(), BETWEEN_STACKS)
        return last_hidden(_answer(decoder, inputs, source))

    def looks_back(self, net: nn.Module) -> bool:
        """Never: an encoder sees the whole source."""
        return False

    def inputs_of(self, ids: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What the net is called with for one row of ids (1, T), source and answer at once."""
        return {"input_ids": ids, "decoder_input_ids": ids}

    def takes_positions(self, net: nn.Module) -> bool:
        """Never: an answer of a packed row would see the sources of the others."""
        return False

    def stages(self, net: nn.Module) -> Stages | None:
        """The net cut for layer-by-layer execution, equal to the plain forward bit for bit; None where unproven."""
        config = text_config(net)
        if not is_proven(config):
            return None
        encoder, decoder = _stacks(net)
        runs = ((encoder, partial(_read, encoder)), (decoder, partial(_answer, decoder)))
        return Stages(
            [make_stack(each, _layer_list(each)[0], run, _finish(each), config.model_type) for each, run in runs]
        )


def _read(encoder: nn.Module, inputs: dict[str, torch.Tensor], source: torch.Tensor | None = None) -> Any:
    """The encoder's output."""
    return call_accepted(encoder, {key: value for key, value in inputs.items() if not key.startswith(OF_DECODER)})


def _answer(decoder: nn.Module, inputs: dict[str, torch.Tensor], source: torch.Tensor | None) -> Any:
    """The decoder's output. Shapes: source (B, S, D)."""
    given: Any = {key.removeprefix(OF_DECODER): v for key, v in inputs.items() if key.startswith(OF_DECODER)}
    given["encoder_hidden_states"] = source
    if "attention_mask" in inputs:
        given["encoder_attention_mask"] = inputs["attention_mask"]
    return call_accepted(decoder, given)


def _finish(stack: nn.Module) -> list[nn.Module]:
    """What follows a stack's last layer; nothing in those that normalise inside of each."""
    found = [getattr(stack, name, None) for name in FINISH]
    return [module for module in found if isinstance(module, nn.Module)]


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
