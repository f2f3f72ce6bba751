"""Causal language models: tokens -> hidden states (B, T, D), with a head (D) -> (V)."""

from collections.abc import Mapping

from tunekit.contracts import Processor
from tunekit.model.families.family import Family
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.model.unsupported import REASON_OF
from tunekit.recipe.model import ModelSection


class CausalFamily(Family):
    """Decoders that continue text. Bases whose configuration names no architecture also belong to this family."""

    endings = ("ForCausalLM", "LMHeadModel")
    class_name = "AutoModelForCausalLM"
    text = "a causal language model"
    task_type = "CAUSAL_LM"

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        return not architecture or super().recognises(architecture, config)

    def obstacle(self, config: Mapping[str, object]) -> str | None:
        return REASON_OF.get(str(config.get("model_type")))

    def processor(self, section: ModelSection) -> Processor:
        return load_tokenizer(section)


FAMILY = CausalFamily()
