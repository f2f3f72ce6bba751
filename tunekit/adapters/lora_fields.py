"""The fields of PEFT's LoraConfig, as every method of peft_type LORA shares them.

Comes in: nothing.  Goes out: tables for PeftSide.  Next: lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunekit.adapters.base import Misfit
from tunekit.adapters.peft_side import ANY
from tunekit.decisions import Target
from tunekit.recipe.low_rank import LowRankSettings
from tunekit.recipe.names import facts_of

LORA_FIELDS: dict[str, tuple[str, Any]] = {  # PEFT's field -> our setting, PEFT's default
    "r": ("r", 8),
    "lora_alpha": ("alpha", 8),
    "lora_dropout": ("dropout", 0.0),
    "target_modules": ("target_modules", None),
    "exclude_modules": ("exclude_modules", None),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "use_rslora": ("use_rslora", False),
    "bias": ("bias", "none"),
    "modules_to_save": ("modules_to_save", []),
    "layers_to_transform": ("layers_to_transform", []),
    "layers_pattern": ("layers_pattern", None),
}
LORA_FIXED: dict[str, tuple[Any, ...]] = {  # first the value written, then the others that change nothing
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "corda_config": (None, ANY),  # how A and B were first filled: init_lora_weights decides
    "ensure_weight_tying": (False,),
    "eva_config": (None, ANY),
    "fan_in_fan_out": (False, True),  # the layer's own class decides
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others have changed the base
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "loftq_config": ({}, None),
    "lora_bias": (False,),
    "lora_ga_config": (None, ANY),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "monteclora_config": (None,),
    "qalora_group_size": (16, ANY),  # of use_qalora
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}


def saved_modules(settings: LowRankSettings) -> Sequence[str]:
    """Modules trained whole, as Method.copies asks for them."""
    return settings.modules_to_save


def start_misfits(settings: LowRankSettings, targets: Sequence[Target], file: bool) -> list[Misfit]:
    """Odd ranks under a start that halves the rank, as Method.misfits reports them; a file's start is long past."""
    if file or settings.start == "default" or not facts_of("starts", settings.start).NEEDS_EVEN_RANK:
        return []
    odd = [target.name for target in targets if target.kind != "embedding" and (target.r or settings.r) % 2]
    what = f"start: {settings.start} needs an even rank, and that of {len(odd)} layers is odd (such as {odd[:1]})"
    return [Misfit("r", what, "write an even r")] if odd else []
