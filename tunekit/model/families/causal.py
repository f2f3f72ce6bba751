"""Causal language models, and what the other families share with them.

Comes in: a net as transformers builds it.  Goes out: `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tunekit.contracts import Processor, Stages
from tunekit.errors import ModelError
from tunekit.model.families.heads import TextHead, make_head
from tunekit.model.families.stages import is_proven, make_stack
from tunekit.model.families.structure import (
    accepted_names,
    base_name,
    call_accepted,
    last_hidden,
    name_of,
    text_config,
)
from tunekit.recipe.model import ModelSection

UNUSED_ROWS = 2  # OPT's table of positions begins with two rows that no position uses
FINAL_NORMS = (
    *("norm", "ln_f", "final_layernorm", "final_layer_norm"),
    *("norm_f", "final_norm", "layer_norm", "layernorm", "embedding_norm"),  # the last one LFM2's
)


@dataclass(frozen=True)
class Family:
    """Causal language models: tokens in, hidden states (B, T, D), a head (D) -> (V)."""

    name: str = "causal"
    task_type: str | None = "CAUSAL_LM"  # as PEFT's adapter folders name the family; None: PEFT has no class for it
    text: str = "a causal language model"
    answers: bool = True  # whether it generates text
    reads_source: bool = False  # whether an encoder reads the prompt, and the answer is a sequence of its own
    is_pipeline: bool = False  # whether the base is a folder of several models, and a merged one too
    reads_ids: bool = True  # whether what it is asked is token ids; else recordings or images
    ids: str | None = "input_ids"  # the input that holds the ids of which it has logits; None: it has no vocabulary
    unread: tuple[str, ...] = ()  # beginnings of names in the base's files for which the net has no place

    def auto_class(self) -> Any:
        """transformers' class that loads a base of this family."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def processor(self, section: ModelSection) -> Processor:
        """What turns examples into rows for a base of this family. Raises: ModelError."""
        from tunekit.model.text.tokenizer import load_tokenizer

        return load_tokenizer(section)

    def layers(self, net: nn.Module) -> list[tuple[str, nn.Module]]:
        """The decoder layers in order, with their module names."""
        name, layers = _find_layers(net)
        return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]

    def hidden(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, D) hidden states after the final norm; no head, no cache, no full logits.

        Of `inputs` (input_ids or inputs_embeds, position_ids, attention_mask) the base takes what it accepts.
        """
        hidden = last_hidden(call_accepted(net.get_submodule(base_name(net)), inputs))
        for module in _before_projection(net):
            hidden = module(hidden)
        return hidden

    def logits(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The net's own logits, whole: (B, T, V), of a classifier (B, C). Training reads hidden states and head."""
        logits: torch.Tensor = call_accepted(net, inputs).logits
        return logits

    def looks_back(self, net: nn.Module) -> bool:
        """Whether each position sees only those before it, so that rows may lie end to end."""
        return True

    def reads_rows(self, net: nn.Module) -> bool:
        """Whether the head reads whole rows, so that only the net itself can call it."""
        return False

    def trained_with(self, net: nn.Module) -> list[str]:
        """Names of modules that are trained whole beside any adapter."""
        return []

    def beside(self, net: nn.Module) -> list[nn.Module]:
        """Modules that are no part of the net and are needed now and then: their place is the host."""
        return []

    def facts(self, net: nn.Module) -> dict[str, Any]:
        """What an objective of this family must know of the net."""
        return {}

    def hidden_size(self, net: nn.Module) -> int:
        """Of what the layers hand on."""
        return int(text_config(net).hidden_size)

    def inputs_of(self, ids: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What the net is called with for one row of ids (1, T); `beside`: of a batch, whose first row has what else
        the net reads."""
        return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}

    def trial_inputs(self, net: nn.Module) -> dict[str, torch.Tensor]:
        """Of a family that reads no ids: what the net could be called with for one row, always the same."""
        raise NotImplementedError

    def scores(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the head makes of one row, of what the net is called with: (T, V) float32, of a classifier (1, C)."""
        return self.head(net).logits(self.hidden(net, inputs)[0])

    def takes_positions(self, net: nn.Module) -> bool:
        """Whether the base accepts position ids; without them rows cannot be packed or padded on the left."""
        return "position_ids" in accepted_names(net.get_submodule(base_name(net)))

    def head(self, net: nn.Module) -> TextHead:
        """The output projection, with its scale and soft cap."""
        name = self.head_name(net)
        if name is None:
            raise ModelError(f"{type(net).__name__} has no output projection", "choose a causal language model")
        return make_head(net, name, text_config(net))

    def head_name(self, net: nn.Module) -> str | None:
        """Module name of the output projection."""
        return name_of(net, _call(net, "get_output_embeddings"))

    def embedding_name(self, net: nn.Module) -> str | None:
        """Module name of the token embedding."""
        return name_of(net, _call(net, "get_input_embeddings"))

    def learned_positions(self, net: nn.Module) -> int | None:
        """Usable rows of a learned table of positions; None where positions are computed.

        A table that has a row for padding (RoBERTa's kind) counts from behind that row on.
        """
        declared, tokens = getattr(text_config(net), "max_position_embeddings", None), self.embedding_name(net)
        if not isinstance(declared, int):
            return None
        tables = [
            declared if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1
            for name, module in net.named_modules()
            if isinstance(module, nn.Embedding)
            and name != tokens
            and 0 <= module.num_embeddings - declared <= UNUSED_ROWS
        ]
        return min(tables, default=None)

    def tied(self, net: nn.Module) -> bool:
        """Whether the head and the token embedding are one matrix."""
        head, embedding = self.head_name(net), self.embedding_name(net)
        if head is None or embedding is None:
            return False
        ours = getattr(net.get_submodule(head), "weight", None)
        return ours is not None and ours is getattr(net.get_submodule(embedding), "weight", None)

    def stages(self, net: nn.Module) -> Stages | None:
        """The net cut for layer-by-layer execution, equal to the plain forward bit for bit; None where unproven."""
        config, base, name = text_config(net), net.get_submodule(base_name(net)), _find_layers(net)[0]
        holder, _, attribute = name.rpartition(".")
        parent = net.get_submodule(holder)
        norms = [getattr(parent, norm) for norm in FINAL_NORMS if isinstance(getattr(parent, norm, None), nn.Module)]
        if not is_proven(config):
            return None
        run, finish = partial(_run_base, base), [*norms[:1], *_before_projection(net)]
        return Stages([make_stack(parent, attribute, run, finish, config.model_type)])


def _run_base(base: nn.Module, inputs: dict[str, torch.Tensor], source: torch.Tensor | None) -> None:
    call_accepted(base, inputs)


def _before_projection(net: nn.Module) -> list[nn.Module]:
    """What a head does before its projection, where that is a module beside it, as in ModernBERT's decoder."""
    head, projection = getattr(net, "lm_head", None), _call(net, "get_output_embeddings")
    if not isinstance(head, nn.Module) or projection is None or projection in head.modules():
        return []
    return [head]


def _call(net: nn.Module, method: str) -> Any:
    return getattr(net, method)()


def _find_layers(net: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds as many layers as the configuration says, nearest to the root."""
    count = int(text_config(net).num_hidden_layers)
    prefix = base_name(net)
    found = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.startswith(prefix + ".")
    ]
    if not found:
        raise ModelError(
            f"{type(net).__name__} has no list of {count} decoder layers", "choose a decoder-only language model"
        )
    return min(found, key=lambda pair: pair[0].count("."))
