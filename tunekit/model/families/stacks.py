"""The arrangement of a net's layers (one stack, or an encoder and a decoder), and its forward without the head."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tunekit.contracts import NamedModules, Stages, Tensors
from tunekit.errors import ModelError
from tunekit.model.call import BETWEEN_STACKS, current_call, seed_layer
from tunekit.model.families.heads import before_projection
from tunekit.model.families.stages import is_proven, make_stack
from tunekit.model.families.structure import base_of, call_accepted, find_layers, last_hidden, name_of
from tunekit.model.pretrained import as_pretrained, config_of

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

FINAL_NORMS = (
    *("norm", "ln_f", "final_layernorm", "final_layer_norm"),
    *("norm_f", "final_norm", "layer_norm", "layernorm", "embedding_norm"),  # the last one is LFM2's
)
OF_DECODER = "decoder_"
FINISH = ("final_layer_norm", "layer_norm", "norm", "dropout")  # BART's `dropout` attribute is a number, for embeddings


class OneStack:
    """A net with one stack: a decoder or an encoder."""

    def layers(self, net: nn.Module) -> NamedModules:
        """The layers in order, with their module names."""
        name, layers = find_layers(net)
        return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]

    def run(self, net: nn.Module, inputs: Tensors) -> ModelOutput:
        """The output of the net without its head."""
        return call_accepted(base_of(net), inputs)

    def hidden(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """Hidden states (B, T, D) after the final norm."""
        hidden = last_hidden(self.run(net, inputs))
        for module in before_projection(net):
            hidden = module(hidden)
        return hidden

    def stages(self, net: nn.Module) -> Stages | None:
        """The net, divided into stages that run layer by layer. None if no test proves that the results are the same as
        in a normal forward."""
        name = find_layers(net)[0]
        if not is_proven(net):
            return None
        holder, _, attribute = name.rpartition(".")
        parent = net.get_submodule(holder)
        norms = [norm for name in FINAL_NORMS if isinstance(norm := getattr(parent, name, None), nn.Module)]
        finish = [*norms[:1], *before_projection(net)]
        return Stages([make_stack(net, parent, attribute, lambda inputs, _: self.run(net, inputs), finish)])


class TwoStacks:
    """A net with an encoder, which reads a source, and a decoder, which reads answers (the inputs `decoder_...`)."""

    def layers(self, net: nn.Module) -> NamedModules:
        """The encoder's layers in order, then the decoder's, with their module names."""
        return [
            (f"{name_of(net, stack)}.{list_name}.{index}", layer)
            for stack in _stacks(net)
            for list_name, layers in [_layer_list(stack)]
            for index, layer in enumerate(layers)
        ]

    def hidden(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """Hidden states (B, T, D) of the decoder after its final norm. If several answers share a source, the input
        `source_rows` (N,) has the row number of the source for each answer."""
        encoder, decoder = _stacks(net)
        source = last_hidden(_read(encoder, inputs))  # (B, S, D)
        rows = inputs.get("source_rows")
        if rows is not None:
            source, inputs = source[rows], {**inputs, "attention_mask": inputs["attention_mask"][rows]}  # (N, S, D)
        call = current_call()
        if call.seeded:
            seed_layer(call, BETWEEN_STACKS)
        return last_hidden(_answer(decoder, inputs, source))

    def stages(self, net: nn.Module) -> Stages | None:
        """The net, divided into stages that run layer by layer. None if no test proves that the results are the same as
        in a normal forward."""
        if not is_proven(net):
            return None
        encoder, decoder = _stacks(net)
        runs = ((encoder, partial(_read, encoder)), (decoder, partial(_answer, decoder)))
        return Stages([make_stack(net, stack, _layer_list(stack)[0], run, _finish(stack)) for stack, run in runs])


ONE, TWO = OneStack(), TwoStacks()


def stacks_of(net: nn.Module) -> OneStack | TwoStacks:
    """OneStack or TwoStacks, as the net's configuration declares."""
    return TWO if getattr(config_of(net), "is_encoder_decoder", False) else ONE


def _read(encoder: nn.Module, inputs: Tensors, source: Tensor | None = None) -> ModelOutput:
    """The encoder's output."""
    return call_accepted(encoder, {key: value for key, value in inputs.items() if not key.startswith(OF_DECODER)})


def _answer(decoder: nn.Module, inputs: Tensors, source: Tensor | None) -> ModelOutput:
    """The decoder's output for the answers in `inputs`. Shapes: source (B, S, D)."""
    answer = {key.removeprefix(OF_DECODER): value for key, value in inputs.items() if key.startswith(OF_DECODER)}
    mask = {"encoder_attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    return call_accepted(decoder, {**answer, "encoder_hidden_states": source, **mask})


def _finish(stack: nn.Module) -> list[nn.Module]:
    """The modules after a stack's last layer, such as the final norm; empty if the stack has none."""
    modules = [getattr(stack, name, None) for name in FINISH]
    return [module for module in modules if isinstance(module, nn.Module)]


def _stacks(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder."""
    holder = as_pretrained(net)
    return holder.get_encoder(), holder.get_decoder()


def _layer_list(stack: nn.Module) -> tuple[str, nn.ModuleList]:
    """The attribute name of a stack's list of layers, and the list."""
    for name, module in stack.named_children():
        if isinstance(module, nn.ModuleList) and len(module):
            return name, module
    raise ModelError(f"{type(stack).__name__} has no list of layers", "choose an encoder-decoder such as T5 or BART")
