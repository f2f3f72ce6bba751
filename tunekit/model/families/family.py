"""What is known of a family of models: how a base is recognised, loaded and called, and where its parts are."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from tunekit.contracts import ModelOutput, NamedModules, Processor, Stages, Tensors
from tunekit.errors import ModelError
from tunekit.formats.labels import SINGLE_LABEL
from tunekit.model.families.heads import (
    TextHead,
    draw_module,
    label_head,
    label_head_name,
    make_head,
    modules_after_base,
    scores_tokens,
)
from tunekit.model.families.stacks import ONE, OneStack, TwoStacks
from tunekit.model.families.structure import accepted_names, base_of, call_accepted, name_of
from tunekit.model.pretrained import AutoClass, as_pretrained, config_of, text_config
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.records import JsonObject

UNUSED_ROWS = 2  # OPT's table of positions begins with two rows that no position uses


class Family:
    """One family. The defaults are those of a net that reads token ids, looks back only and writes text."""

    endings: tuple[str, ...] = ()  # of the architecture's name in config.json
    index_file: str | None = None  # the file by which bases without config.json are recognised
    precedence = 0  # families of a higher one are asked first
    class_name: str  # of transformers' class that loads a base
    text: str  # "a causal language model"
    task_type: str | None = None  # as PEFT's adapter folders name the family; None: PEFT has no class for it
    answers = True  # whether it generates text
    labelled = False  # whether its head gives one score a label, and is trained with every adapter
    reads_ids = True  # whether a question is token ids; else recordings or images
    ids: str | None = "input_ids"  # the input that holds the ids of which it has logits; None: it has no vocabulary
    part_of: tuple[str, ...] = ()  # keys of the configurations of larger models of which it loads one part
    unread: tuple[str, ...] = ()  # beginnings of names in the base's files for which the net has no place
    head_parts: tuple[str, ...] = ()  # modules of a head that has several; the last one scores the labels
    reads_source = False  # whether an encoder reads the prompt, and the answer is a sequence of its own
    stacks: OneStack | TwoStacks = ONE

    @property
    def name(self) -> str:
        """The name of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def is_pipeline(self) -> bool:
        """Whether a base is a folder of several models, and a merged one too."""
        return self.index_file is not None

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        """Whether a base of this architecture ("" where config.json names none) belongs to the family."""
        return architecture.endswith(self.endings)

    def with_head(self, modules: Set[str]) -> Family:
        """The family as which a base of this one is loaded where an adapter trains these modules."""
        return self

    def obstacle(self, config: Mapping[str, object]) -> str | None:
        """Why a base with this config.json cannot be loaded as one of the family; None where it can."""
        return None

    def auto_class(self) -> AutoClass:
        """transformers' class that loads a base of this family."""
        import transformers

        return getattr(transformers, self.class_name)

    def load(self, folder: Path, section: ModelSection, dtype: torch.dtype, *, meta: bool) -> nn.Module:
        """The net of a base that has the family's `index_file`; others are read by `auto_class`. `meta`: no weights.

        Raises: ModelError.
        """
        raise NotImplementedError

    def processor(self, section: ModelSection) -> Processor:
        """What turns examples into rows for a base of this family. Raises: ModelError."""
        raise NotImplementedError

    def layers(self, net: nn.Module) -> NamedModules:
        """The layers in order, with their module names."""
        return self.stacks.layers(net)

    def forward(self, net: nn.Module, inputs: Tensors) -> ModelOutput:
        """What objectives read: logits of a head that reads whole rows, else hidden states and the head."""
        if self.reads_rows(net):
            return ModelOutput(logits=self.logits(net, inputs))
        return ModelOutput(hidden=self.hidden(net, inputs), head=self.head(net))

    def hidden(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """(B, T, D) hidden states after the final norm; no head, no cache, no full logits.

        Of `inputs` (input_ids or inputs_embeds, position_ids, attention_mask) the base takes what it accepts; a decoder
        with a head of labels needs no mask, since padding comes last.
        """
        left_out = "attention_mask" if self.labelled else ""
        return self.stacks.hidden(net, {name: tensor for name, tensor in inputs.items() if name != left_out})

    def logits(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """The net's own logits, whole: (B, T, V), of a classifier (B, C). Training reads hidden states and head."""
        return call_accepted(net, inputs).logits

    def use_note(self, net: nn.Module, folder: Path) -> str:
        """How the model in this folder must be called, where other programs would not do it by themselves."""
        return ""

    def looks_back(self, net: nn.Module) -> bool:
        """Whether each position sees only those before it, so that rows may lie end to end."""
        return scores_tokens(net) if self.labelled else not self.reads_source

    def reads_rows(self, net: nn.Module) -> bool:
        """Whether the head reads whole rows, so that only the net itself can call it."""
        return False

    def trained_with(self, net: nn.Module) -> list[str]:
        """Names of modules that are trained whole beside any adapter: the head, and what PEFT trains with it. It takes
        `classifier` in modules_to_save for the end of a name, and so means DistilBERT's `pre_classifier` too."""
        head = self.head_name(net) if self.labelled else None
        return [] if head is None else [name for name, _ in net.named_children() if name.endswith(head)]

    def new_head(self, section: ModelSection, net: nn.Module) -> tuple[str, ...]:
        """Names of the modules of the head that the section asks for, which the base's files need not hold."""
        if not isinstance(section, HeadedModel):
            return ()
        return tuple(dict.fromkeys([*modules_after_base(net), *self.trained_with(net)]))

    def head_modules(self, net: nn.Module) -> list[str]:
        """Names of the output projection and of what is trained whole: no quantization packs them."""
        names = (self.head_name(net), *self.trained_with(net))
        return list(dict.fromkeys(name for name in names if name is not None))

    def draw_head(self, section: ModelSection, net: nn.Module, dtype: torch.dtype) -> None:
        """Values for the modules of a head that the base's files do not hold, and for scores of other labels."""
        if not isinstance(section, HeadedModel):
            return
        for name in self.new_head(section, net):
            other_labels = section.new_head and name == self.head_name(net)
            if other_labels or any(tensor.is_meta for tensor in net.get_submodule(name).parameters()):
                draw_module(net, name, section.head_seed, dtype)

    def beside(self, net: nn.Module) -> list[nn.Module]:
        """Modules that are no part of the net and are needed now and then: their place is the host."""
        return []

    def facts(self, net: nn.Module) -> JsonObject:
        """What an objective of this family must know of the net: the labels of its head, what its scores mean if that
        is stated and they are not those of one label, and from where on they name a label."""
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

    def inputs_of(self, ids: Tensor, beside: Mapping[str, Tensor] | None = None) -> Tensors:
        """What the net is called with for one row of ids (1, T); `beside`: of a batch, whose first row has what else
        the net reads."""
        return {"input_ids": ids} | ({} if self.labelled else {"position_ids": torch.arange(ids.shape[1])[None]})

    def trial_inputs(self, net: nn.Module) -> Tensors:
        """Of a family that reads no ids: what the net could be called with for one row, always the same."""
        raise NotImplementedError

    def scores(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """What the head makes of one row, of what the net is called with: (T, V) float32, of a classifier (1, C)."""
        if self.labelled or self.reads_rows(net):
            return self.logits(net, inputs).float()
        return self.head(net).logits(self.hidden(net, inputs)[0])

    def takes_positions(self, net: nn.Module) -> bool:
        """Whether the base accepts position ids; without them rows cannot be packed or padded on the left."""
        return self.looks_back(net) and "position_ids" in accepted_names(base_of(net))

    def head(self, net: nn.Module) -> TextHead:
        """The output projection, with its scale and soft cap. Raises: ModelError where only the net can call it."""
        if self.labelled:
            return label_head(net)
        name = self.head_name(net)
        if name is None:
            raise ModelError(f"{type(net).__name__} has no output projection", "choose a causal language model")
        return make_head(net, name)

    def head_name(self, net: nn.Module) -> str | None:
        """Module name of the output projection."""
        return label_head_name(net) if self.labelled else name_of(net, as_pretrained(net).get_output_embeddings())

    def embedding_name(self, net: nn.Module) -> str | None:
        """Module name of the token embedding."""
        return name_of(net, as_pretrained(net).get_input_embeddings()) if self.ids else None

    def learned_positions(self, net: nn.Module) -> int | None:
        """Usable rows of a learned table of positions; None where positions are computed.

        A table that has a row for padding (RoBERTa's kind) counts from behind that row on.
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
        """Whether the head and the token embedding are one matrix."""
        head, embedding = self.head_name(net), self.embedding_name(net)
        if head is None or embedding is None:
            return False
        ours = getattr(net.get_submodule(head), "weight", None)
        return ours is not None and ours is getattr(net.get_submodule(embedding), "weight", None)

    def stages(self, net: nn.Module) -> Stages | None:
        """The net cut for layer-by-layer execution, equal to the plain forward bit for bit; None where unproven, and
        where the head reads whole rows: what follows the layers is then not a norm alone."""
        return None if self.reads_rows(net) else self.stacks.stages(net)
