"""Causal language models: tokens in, hidden states (B, T, D), a head (D) -> (V)."""

from __future__ import annotations

from collections.abc import Mapping

from tunekit.model.families.family import Family


class CausalFamily(Family):
    """A decoder alone; also what a base is taken for whose configuration names no architecture."""

    endings = ("ForCausalLM", "LMHeadModel")
    class_name = "AutoModelForCausalLM"
    text = "a causal language model"
    task_type = "CAUSAL_LM"

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        return not architecture or super().recognises(architecture, config)


FAMILY = CausalFamily()
