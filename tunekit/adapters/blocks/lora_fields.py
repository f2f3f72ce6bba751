"""What every method of peft_type LORA shares: the fields of PEFT's LoraConfig, and what does not fit the layers."""

from collections.abc import Mapping, Sequence

from tunekit.adapters.base import Settings
from tunekit.adapters.folder.fields import ANY, Fixed, PeftFields, PeftSide, named_alike
from tunekit.adapters.method import Conflict
from tunekit.adapters.starts.start import LINEAR
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.records import Target

LORA_FIELDS: PeftFields = {  # PEFT's field -> our setting, PEFT's default
    **named_alike(r=8, use_rslora=False, bias="none"),
    "lora_alpha": ("alpha", 8),
    "lora_dropout": ("dropout", 0.0),
}
LORA_FIXED: Fixed = {  # first the value written, then the others that change nothing
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "corda_config": (None, ANY),  # how A and B were first filled: init_lora_weights decides
    "ensure_weight_tying": (False, True),  # folder/read.py adapts, or copies, a tied head as well
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


LORA_MENDS = {
    "init_lora_weights": "such a start may have moved weights of the base: tunekit adapter convert writes plain LoRA",
}


def lora_side(
    settings: type[Settings], fields: PeftFields = LORA_FIELDS, claims: Mapping[str, object] | None = None
) -> PeftSide[Settings]:
    """The side of a method of peft_type LORA with these fields and claims."""
    fixed = {name: values for name, values in LORA_FIXED.items() if name not in fields}
    known = ("LORA", settings, fields, fixed, claims or {})
    return PeftSide(*known, mends=LORA_MENDS, resolve=_without_dropout, refuses_kernel_layers=True, takes_experts=True)


def _without_dropout(settings: object, targets: object, config: Mapping[str, object]) -> dict[str, float]:
    """PEFT does not drop from the input of a parameter, and refuses a file that asks for it."""
    return {"lora_dropout": 0.0} if config["target_parameters"] else {}


def start_conflicts(settings: LowRankSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    """Layers that the initialisation cannot fill, as Method.conflicts reports them; a file's layers are filled."""
    start, linear = settings.start, [target for target in targets if target.kind in LINEAR]
    if file:
        return []
    conflicts = []
    odd = [target.name for target in linear if (target.r or settings.r) % 2]
    if start.needs_even_rank and odd:
        what = f"start: {start.method} needs an even rank, and that of {len(odd)} layers is odd (such as {odd[:1]})"
        conflicts.append(Conflict("r", what, "write an even r"))
    still = [target.name for target in linear if (settings.alpha if target.alpha is None else target.alpha) == 0]
    if start.divides_by_scaling and still:
        what = f"start: {start.method} divides by the scaling, and alpha is 0 for {len(still)} layers ({still[0]})"
        conflicts.append(Conflict("alpha", what, "write an alpha above 0"))
    narrow = [target.name for target in linear if 2 * (target.r or 0) > min(target.in_features, target.out_features)]
    if start.needs_twice_the_rank and narrow:
        what = f"start: {start.method} needs 2 r singular vectors, and {len(narrow)} layers have fewer ({narrow[0]})"
        conflicts.append(Conflict("r", what, "write a smaller r"))
    return conflicts
