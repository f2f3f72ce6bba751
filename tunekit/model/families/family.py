"""The interface of a model family: how a base is recognised, loaded and called, and the names of its modules."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from tunekit.contracts import ModelOutput, NamedModules, Processor, Stages, Tensors
from tunekit.errors import ModelError
from tunekit.formats.labels import REGRESSION, SINGLE_LABEL
from tunekit.model.families.heads import (
    TextHead,
    draw_module,
    label_head,
    label_head_name,
    make_head,
    modules_after_base,
    scores_tokens,
    set_bias,
    set_row_difference,
)
from tunekit.model.families.stacks import ONE, OneStack, TwoStacks
from tunekit.model.families.structure import accepted_names, base_of, call_accepted, name_of, text_net
from tunekit.model.pretrained import AutoClass, as_pretrained, config_of, text_config
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.records import JsonObject

UNUSED_ROWS = 2  # OPT's position table starts with two unused rows


class Family:
    """A family of models. The defaults fit a causal net that reads token ids and writes text."""

    endings: tuple[str, ...] = ()  # endings of the architecture's name in config.json
    index_file: str | None = None  # identifies bases without a config.json
    precedence = 0  # families with higher precedence are tried first
    class_name: str  # transformers' class that loads a base
    text: str  # the family in messages, such as "a causal language model"
    copied: tuple[str, ...] = ()  # further files in a base's folder that a model made from it needs unchanged
    trained_as: str | None = None  # the family whose objectives train it; None: its own
    task_type: str | None = None  # the family's name in PEFT's adapter folders; None: PEFT has no class for it
    answers = True  # whether it generates text
    headless = False  # whether its nets are loaded without a head, so that objectives read hidden states
    labelled = False  # whether its head gives one score per label, and is trained with every adapter
    reads_ids = True  # whether the net reads token ids; otherwise recordings or images
    ids: str | None = "input_ids"  # the input whose ids are predicted; None: no vocabulary
    unread: tuple[str, ...] = ()  # prefixes of tensor names in the base's files that the net does not use
    head_parts: tuple[str, ...] = ()  # modules of a head with several parts; the last one scores the labels
    reads_source = False  # whether an encoder reads the prompt, so that the answer is a separate sequence
    stacks: OneStack | TwoStacks = ONE

    @property
    def name(self) -> str:
        """The name of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def objectives(self) -> str:
        """The name of the family whose objectives train and evaluate models of this family."""
        return self.trained_as or self.name

    @property
    def is_pipeline(self) -> bool:
        """Whether each base or merged model of this family is a folder with several models."""
        return self.index_file is not None

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        """Whether a base of this architecture ("" if config.json names none) belongs to the family."""
        return architecture.endswith(self.endings)

    def with_head(self, modules: Set[str]) -> Family:
        """The family as which a base is loaded for an adapter that also contains the fully trained `modules`."""
        return self

    def obstacle(self, config: Mapping[str, object]) -> str | None:
        """The reason why a base with this config.json cannot be loaded as a model of this family; None if there is
        none."""
        return None

    def auto_class(self) -> AutoClass:
        """transformers' class that loads a base of this family."""
        import transformers

        return getattr(transformers, self.class_name)

    def leave_out(self, net: nn.Module, section: ModelSection) -> None:
        """Move the parts of the net that the rows do not need to the meta device."""

    def set_apart(self, net: nn.Module, section: ModelSection) -> None:
        """Take the loaded parts that no adapter may change out of the net's modules."""

    def load(self, folder: Path, section: ModelSection, dtype: torch.dtype, *, meta: bool) -> nn.Module:
        """Load the net of a base that has the family's `index_file`. Other bases are loaded by `auto_class`. `meta`:
        make the net without weights.

        Raises: ModelError.
        """
        raise NotImplementedError

    def processor(self, section: ModelSection) -> Processor:
        """The processor that turns examples into rows for a base of this family. Raises: ModelError."""
        raise NotImplementedError

    def base_facts(self, section: ModelSection) -> JsonObject:
        """Facts in the files of a base that objectives of this family read, such as the pooling of an embedding model.
        Raises: ModelError."""
        return {}

    def layers(self, net: nn.Module) -> NamedModules:
        """The layers in order, with their module names."""
        return self.stacks.layers(net)

    def forward(self, net: nn.Module, inputs: Tensors) -> ModelOutput:
        """The output that objectives read: hidden states and the head, or logits if only the net itself can call its
        head."""
        if self.reads_rows(net):
            return ModelOutput(logits=self.logits(net, inputs))
        return ModelOutput(hidden=self.hidden(net, inputs), head=self.head(net))

    def hidden(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """Hidden states (B, T, D) after the final norm. Neither the head nor a cache is used.

        `inputs`: input_ids or inputs_embeds, position_ids, attention_mask; inputs that the base does not accept are
        dropped. A decoder with a classification head gets no mask, because padding comes after the text.
        """
        omitted = "attention_mask" if self.labelled else ""
        return self.stacks.hidden(net, {name: tensor for name, tensor in inputs.items() if name != omitted})

    def logits(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """The logits that the net itself computes: (B, T, V), or (B, C) for a classifier. Training uses hidden states
        and the head instead, if possible."""
        return call_accepted(text_net(net), inputs).logits

    def use_note(self, net: nn.Module, folder: Path) -> str:
        """A note on how to call the model in this folder, if other programs would call it wrongly by default."""
        return ""

    def looks_back(self, net: nn.Module) -> bool:
        """Whether each position attends only to earlier positions, so that rows may be packed."""
        return scores_tokens(net) if self.labelled else not self.reads_source

    def reads_rows(self, net: nn.Module) -> bool:
        """Whether the head needs all hidden states of a row, so that only the net itself can call its head."""
        return False

    def trained_with(self, net: nn.Module) -> list[str]:
        """Names of modules that are fully trained in addition to any adapter: the classification head, and the modules
        that PEFT trains together with the head.

        PEFT trains every module whose name ends with `classifier`, such as DistilBERT's `pre_classifier`.
        """
        head = self.head_name(net) if self.labelled else None
        return [] if head is None else [name for name, _ in net.named_children() if name.endswith(head)]

    def new_head(self, section: ModelSection, net: nn.Module) -> tuple[str, ...]:
        """Names of the head's modules if the recipe trains a classification head, otherwise empty. The base's files
        need not contain these modules."""
        if not isinstance(section, HeadedModel):
            return ()
        return tuple(dict.fromkeys([*modules_after_base(net), *self.trained_with(net)]))

    def head_modules(self, net: nn.Module) -> list[str]:
        """Names of the output projection and of the fully trained modules, which are never quantized."""
        names = (self.head_name(net), *self.trained_with(net))
        return list(dict.fromkeys(name for name in names if name is not None))

    def draw_head(self, section: ModelSection, net: nn.Module, dtype: torch.dtype) -> None:
        """Initialise the head's modules that the base's files lack, and the last module if the recipe's labels differ
        from the base's."""
        if not isinstance(section, HeadedModel):
            return
        for name in self.new_head(section, net):
            other_labels = section.new_head and name == self.head_name(net)
            if other_labels or any(tensor.is_meta for tensor in net.get_submodule(name).parameters()):
                exact = name == self.exact_head(net)
                draw_module(net, name, section.head_seed, torch.float32 if exact else dtype)
                if section.head_rows and name == self.head_name(net):
                    set_row_difference(net, name, section)
                if section.head_bias and name == self.head_name(net):
                    set_bias(net.get_submodule(name), section.head_bias)

    def frozen_parts(self, net: nn.Module) -> list[nn.Module]:
        """Models that are not modules of the net, and that are on the host unless a computation needs them."""
        return []

    def facts(self, net: nn.Module) -> JsonObject:
        """Facts about a classification head for objectives: `labels`; `problem_type`, unless it is single-label
        classification; `thresholds`, one per label: a label is predicted if its score is above its threshold."""
        if not self.labelled:
            return {}
        config = config_of(net)
        stated = getattr(config, "problem_type", None)
        thresholds = getattr(config, "thresholds", None)
        meaning: JsonObject = {} if stated in (None, SINGLE_LABEL) else {"problem_type": str(stated)}
        if isinstance(thresholds, list) and len(thresholds) == len(config.id2label):
            meaning["thresholds"] = thresholds
        return {"labels": [str(label) for _, label in sorted(config.id2label.items())], **meaning}

    def hidden_size(self, net: nn.Module) -> int:
        """Width of the hidden states."""
        return int(text_config(net).hidden_size)

    def inputs_of(self, ids: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Tensors:
        """The net's inputs for one row of ids (1, T). `inputs`: a batch; inputs other than ids, such as a recording,
        are taken from its first row."""
        return {"input_ids": ids} | ({} if self.labelled else {"position_ids": torch.arange(ids.shape[1])[None]})

    def trial_inputs(self, net: nn.Module) -> Tensors:
        """Fixed inputs (one row) for a test call of a net that does not read token ids."""
        raise NotImplementedError

    def scores(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """The head's scores for one row of inputs: (T, V) float32, or (1, C) for a classifier."""
        if self.labelled or self.reads_rows(net):
            return self.logits(net, inputs).float()
        return self.head(net).logits(self.hidden(net, inputs)[0])

    def takes_positions(self, net: nn.Module) -> bool:
        """Whether the base accepts position ids. Without position ids, rows cannot be packed or padded on the left."""
        return self.looks_back(net) and "position_ids" in accepted_names(base_of(net))

    def head(self, net: nn.Module) -> TextHead:
        """The output projection, with its scale and soft cap. Raises: ModelError if only the net can call it."""
        if self.labelled:
            return label_head(net)
        name = self.head_name(net)
        if name is None:
            raise ModelError(f"{type(net).__name__} has no output projection", "choose a causal language model")
        return make_head(net, name)

    def head_name(self, net: nn.Module) -> str | None:
        """Module name of the output projection."""
        return label_head_name(net) if self.labelled else name_of(net, as_pretrained(net).get_output_embeddings())

    def exact_head(self, net: nn.Module) -> str | None:
        """Name of the head if it predicts numbers and therefore computes in float32; None for other heads. bfloat16 is
        too coarse: from 1024 to 2048 it has only multiples of 8."""
        numbers = self.labelled and getattr(config_of(net), "problem_type", None) == REGRESSION
        return self.head_name(net) if numbers else None

    def embedding_name(self, net: nn.Module) -> str | None:
        """Module name of the token embedding."""
        return name_of(net, as_pretrained(net).get_input_embeddings()) if self.ids else None

    def learned_positions(self, net: nn.Module) -> int | None:
        """The number of usable rows in a learned table of positions; None if positions are computed.

        In a table with a padding row (such as RoBERTa's), the first position is after the padding row.
        """
        declared = getattr(text_config(net), "max_position_embeddings", None)
        if self.ids is None or not isinstance(declared, int):
            return None
        tokens, rows = self.embedding_name(net), list[int]()
        for name, table in net.named_modules():
            if not isinstance(table, nn.Embedding) or name == tokens:
                continue
            count, padding = table.num_embeddings, table.padding_idx
            if 0 <= count - declared <= UNUSED_ROWS:
                rows.append(declared if padding is None else count - padding - 1)
        return min(rows, default=None)

    def tied(self, net: nn.Module) -> bool:
        """Whether the head and the token embedding share one matrix."""
        head, embedding = self.head_name(net), self.embedding_name(net)
        if head is None or embedding is None:
            return False
        ours = getattr(net.get_submodule(head), "weight", None)
        return ours is not None and ours is getattr(net.get_submodule(embedding), "weight", None)

    def stages(self, net: nn.Module) -> Stages | None:
        """The net, divided into stages that run layer by layer, with the same results as the normal forward, bit for
        bit. None if no test proves these equal results, or if only the net itself can call its head."""
        return None if self.reads_rows(net) else self.stacks.stages(net)
