"""Text models without a head, whose hidden states become the embedding of a text: encoders such as BERT, and
decoders."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from tunekit.contracts import ModelOutput, Processor, Tensors
from tunekit.model.families.causal import CausalFamily
from tunekit.model.families.family import Family
from tunekit.model.families.structure import is_decoder
from tunekit.model.pretrained import AutoClass
from tunekit.model.storage.sentence_transformers import read_modules
from tunekit.model.storage.source import find_source, read_json
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LAST = {"pooling": ["lasttoken"]}  # facts of a decoder: only its last token has seen the whole text
POOLER = "add_pooling_layer"  # BERT's argument for a module that embeddings do not use


class EmbedderFamily(Family):
    """Tokens -> hidden states (B, T, D). No folder is recognised as a member of this family, because the same folders
    are also bases of other families: a recipe's objective names it."""

    class_name = "AutoModel"
    text = "an embedding model"
    task_type = "FEATURE_EXTRACTION"
    answers = False
    headless = True
    unread = ("pooler.", "lm_head.", "cls.", "vocab_")

    def auto_class(self) -> AutoClass:
        return _WithoutPooler()

    def processor(self, section: ModelSection) -> Processor:
        return load_tokenizer(section)

    def base_facts(self, section: ModelSection) -> JsonObject:
        source = find_source(section, weights=False)
        if source.gguf_file is not None:
            return LAST
        architectures = read_json(source.folder / "config.json").get("architectures") or [""]
        return read_modules(source.folder) or (LAST if str(architectures[0]).endswith(CausalFamily.endings) else {})

    def looks_back(self, net: nn.Module) -> bool:
        """Whether the net is a decoder."""
        return is_decoder(net)

    def forward(self, net: nn.Module, inputs: Tensors) -> ModelOutput:
        return ModelOutput(hidden=self.hidden(net, inputs))

    def scores(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """The hidden states of one row of inputs, (T, D) float32."""
        return self.hidden(net, inputs)[0].float()

    def hidden(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """Hidden states (B, T, D). A decoder gets no mask, because padding comes after the text. An encoder gets no
        position ids, because some encoders do not number positions from 0."""
        omitted = "attention_mask" if self.looks_back(net) else "position_ids"
        return self.stacks.hidden(net, {name: tensor for name, tensor in inputs.items() if name != omitted})


class _WithoutPooler:
    """transformers' AutoModel, which makes nets without BERT's pooler."""

    __name__ = "AutoModel"

    def __init__(self) -> None:
        from transformers import AutoModel

        self.auto: AutoClass = AutoModel
        self._model_mapping = self.auto._model_mapping

    def _arguments(self, config: PreTrainedConfig) -> dict[str, object]:
        known = self._model_mapping.get(type(config), None)
        return {POOLER: False} if known and POOLER in inspect.signature(known.__init__).parameters else {}

    def from_config(self, config: PreTrainedConfig, **settings: object) -> nn.Module:
        return self.auto.from_config(config, **settings, **self._arguments(config))

    def from_pretrained(
        self, folder: str, *, output_loading_info: Literal[True], trust_remote_code: bool, **settings: Any
    ) -> tuple[nn.Module, Mapping[str, Collection[object]]]:
        further = {**settings, **self._arguments(settings["config"])}
        return self.auto.from_pretrained(
            folder, output_loading_info=output_loading_info, trust_remote_code=trust_remote_code, **further
        )


FAMILY = EmbedderFamily()
