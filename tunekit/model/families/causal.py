"""Causal language models: tokens -> hidden states (B, T, D), with a head (D) -> (V)."""

from collections.abc import Mapping

from tunekit.contracts import Processor
from tunekit.model.families.family import Family
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.model import ModelSection


class CausalFamily(Family):
    """A decoder. Bases whose configuration names no architecture belong to this family too."""

    endings = ("ForCausalLM", "LMHeadModel")
    class_name = "AutoModelForCausalLM"
    text = "a causal language model"
    task_type = "CAUSAL_LM"

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        return not architecture or super().recognises(architecture, config)

    def processor(self, section: ModelSection) -> Processor:
        return load_tokenizer(section)


FAMILY = CausalFamily()
