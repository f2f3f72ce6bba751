"""Fields of PEFT's LoraConfig, and checks that settings fit the layers, shared by all methods of peft_type LORA."""

from collections.abc import Mapping, Sequence

from tunekit.adapters.base import Settings
from tunekit.adapters.folder.fields import ANY, Fixed, PeftFields, PeftSide, same_names
from tunekit.adapters.method import Conflict
from tunekit.adapters.starts.start import LINEAR
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.records import Target

LORA_FIELDS: PeftFields = {  # PEFT's field -> our setting, PEFT's default
    **same_names(r=8, use_rslora=False, bias="none"),
    "lora_alpha": ("alpha", 8),
    "lora_dropout": ("dropout", 0.0),
}
LORA_FIXED: Fixed = {  # the value that is written, then other accepted values, which have no effect
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "corda_config": (None, ANY),  # settings of the initialisation that init_lora_weights names
    "ensure_weight_tying": (False, True),  # folder/read.py also adapts, or copies, a tied head
    "eva_config": (None, ANY),
    "fan_in_fan_out": (False, True),  # depends only on the class of each layer
    "init_lora_weights": (
        True,
        False,
        "gaussian",
        "orthogonal",
        "eva",
    ),  # other values: the base was changed
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "loftq_config": ({}, None),
    "lora_bias": (False,),
    "lora_ga_config": (None, ANY),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "monteclora_config": (None,),
    "qalora_group_size": (16, ANY),  # used with use_qalora
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}


LORA_REMEDIES = {
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens, but here it would act on "
    "all tokens",
    "layer_replication": "this adapter repeats layers of the base; merge it with peft, and use the merged model",
    "init_lora_weights": "this initialisation may have changed weights of the base; "
    "convert the adapter to plain LoRA with: tunekit adapter convert",
}


def lora_side(
    settings: type[Settings], fields: PeftFields = LORA_FIELDS, claims: Mapping[str, object] | None = None
) -> PeftSide[Settings]:
    """The PeftSide of a method of peft_type LORA with these fields and claims."""
    fixed = {name: values for name, values in LORA_FIXED.items() if name not in fields}
    arguments = ("LORA", settings, fields, fixed, claims or {})
    return PeftSide(
        *arguments, remedies=LORA_REMEDIES, resolve=_without_dropout, refuses_kernel_layers=True, takes_experts=True
    )


def _without_dropout(settings: object, targets: object, config: Mapping[str, object]) -> dict[str, float]:
    """Returns lora_dropout 0 if a parameter is adapted: PEFT cannot apply dropout there, and refuses such a file."""
    return {"lora_dropout": 0.0} if config["target_parameters"] else {}


def start_conflicts(settings: LowRankSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    """Lists the layers that the initialisation method (`start`) cannot initialise, as conflicts for Method.conflicts. A
    file has no such conflicts, because its layers already have values."""
    start, linear = settings.start, [target for target in targets if target.kind in LINEAR]
    if file:
        return []
    conflicts = []
    odd_rank = [target.name for target in linear if (target.r or settings.r) % 2]
    if start.needs_even_rank and odd_rank:
        what = f"start: {start.method} needs an even rank, but {len(odd_rank)} layers have an odd rank ({odd_rank[0]})"
        conflicts.append(Conflict("r", what, "write an even r"))
    unscaled = [target.name for target in linear if (settings.alpha if target.alpha is None else target.alpha) == 0]
    if start.divides_by_scaling and unscaled:
        what = (
            f"start: {start.method} divides by the scaling, but alpha is 0 for {len(unscaled)} layers ({unscaled[0]})"
        )
        conflicts.append(Conflict("alpha", what, "write an alpha above 0"))
    narrow = [target.name for target in linear if 2 * (target.r or 0) > min(target.in_features, target.out_features)]
    if start.needs_twice_the_rank and narrow:
        what = f"start: {start.method} needs 2 r singular vectors, but {len(narrow)} layers have fewer ({narrow[0]})"
        conflicts.append(Conflict("r", what, "write a smaller r"))
    return conflicts
