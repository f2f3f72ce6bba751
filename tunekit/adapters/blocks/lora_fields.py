"""The fields of PEFT's LoraConfig, as every method of peft_type LORA shares them.

Comes in: nothing.  Goes out: tables for PeftSide.  Next: lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunekit.adapters.folder.fields import ANY
from tunekit.adapters.method import Misfit
from tunekit.adapters.starts.start import LINEAR
from tunekit.recipe.low_rank import LowRankSettings
from tunekit.records import Target

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
    "target_parameters": ("target_parameters", []),
    "trainable_token_indices": ("trainable_token_indices", []),
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
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}


def saved_modules(settings: LowRankSettings) -> Sequence[str]:
    """Modules trained whole, as Method.copies asks for them."""
    return settings.modules_to_save


def target_parameters(settings: LowRankSettings) -> Sequence[str]:
    """Fused parameters, as Method.parameters asks for them."""
    return settings.target_parameters


def misfits(settings: LowRankSettings, targets: Sequence[Target], file: bool) -> list[Misfit]:
    """What does not fit the layers or fused parameters, as Method.misfits reports it."""
    found = start_misfits(settings, targets, file)
    if not settings.target_parameters:
        return found
    if settings.method == "dora":
        what = "a fused parameter has no output to scale, and PEFT's files no place for its magnitudes"
        return [*found, Misfit("target_parameters", what, "use the method lora for it")]
    if settings.dropout:
        what = "fused parameters are changed themselves, and their input is not at hand to drop from"
        found.append(Misfit("lora_dropout" if file else "dropout", what, "write dropout: 0, or no target_parameters"))
    if not file and settings.start.method not in ("default", "gaussian"):
        what = f"start: {settings.start.method} cannot fill fused parameters"
        found.append(Misfit("start", what, "write start: default or gaussian, or no target_parameters"))
    copied = [target.name for target in targets for name in settings.modules_to_save if _inside(target.name, name)]
    if copied:
        what = f"'{copied[0]}' is inside a module of modules_to_save, which is trained whole"
        found.append(Misfit("target_parameters", what, "leave it out of one of them"))
    return found


def _inside(parameter: str, module: str) -> bool:
    """Whether a module named by a whole name or an ending holds the parameter."""
    return f".{module}." in f".{parameter}"


def start_misfits(settings: LowRankSettings, targets: Sequence[Target], file: bool) -> list[Misfit]:
    """What a start cannot fill, as Method.misfits reports it; a file's start is long past."""
    start, linear = settings.start, [target for target in targets if target.kind in LINEAR]
    if file:
        return []
    misfits = []
    odd = [target.name for target in linear if (target.r or settings.r) % 2]
    if start.needs_even_rank and odd:
        what = f"start: {start.method} needs an even rank, and that of {len(odd)} layers is odd (such as {odd[:1]})"
        misfits.append(Misfit("r", what, "write an even r"))
    still = [target.name for target in linear if (settings.alpha if target.alpha is None else target.alpha) == 0]
    if start.divides_by_scaling and still:
        what = f"start: {start.method} divides by the scaling, and alpha is 0 for {len(still)} layers ({still[0]})"
        misfits.append(Misfit("alpha", what, "write an alpha above 0"))
    narrow = [target.name for target in linear if 2 * (target.r or 0) > min(target.in_features, target.out_features)]
    if start.method == "lora_ga" and narrow:
        what = f"start: lora_ga needs 2 r singular vectors, and {len(narrow)} layers have fewer ({narrow[0]})"
        misfits.append(Misfit("r", what, "write a smaller r"))
    return misfits
