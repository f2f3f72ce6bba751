"""Layers that PEFT takes otherwise in some architectures than elsewhere: it refuses some, and reads others as experts.

A net and the names of its layers go in; the names among them that need care come out. As of PEFT 0.21.2.
"""

from collections.abc import Collection

from torch import nn

from tunekit.model.families.structure import expert_layout

KERNEL_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
KERNEL_LAYERS = ("out_proj",)  # whose weights these models' kernels read themselves
# Former names of what transformers 5 keeps in fused experts and routers. In the models of such a layout PEFT takes
# every LoRA target of these names for a part of those, dense and shared MLPs included.
EXPERT_NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def refused_by_peft(net: nn.Module, names: Collection[str]) -> set[str]:
    """Those that PEFT adapts in no model of this architecture."""
    if getattr(getattr(net, "config", None), "model_type", None) not in KERNEL_MODELS:
        return set()
    return {name for name in names if name.rpartition(".")[2] in KERNEL_LAYERS}


def taken_for_experts(net: nn.Module, names: Collection[str]) -> set[str]:
    """Those that PEFT would take for parts of experts or routers; as parameters `NAME.weight` it reads them right."""
    former = EXPERT_NAMES.get(expert_layout(net) or "", ())
    return {name for name in names if name.rpartition(".")[2] in former}
