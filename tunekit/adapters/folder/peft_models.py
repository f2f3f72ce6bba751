"""Finds layers that PEFT 0.21.2 treats specially in some architectures: it refuses to adapt some, and reads others as
experts."""

from collections.abc import Collection

from torch import nn

from tunekit.model.families.structure import expert_layout

KERNEL_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
KERNEL_LAYERS = ("out_proj",)  # these models' kernels read their weights directly
# Former names of modules that transformers 5 fuses into experts and routers. In models with this layout PEFT treats
# every LoRA target with these names as a part of them, including dense and shared MLPs.
EXPERT_NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def refused_by_peft(net: nn.Module, names: Collection[str]) -> set[str]:
    """The layers that PEFT refuses to adapt in this architecture."""
    if getattr(getattr(net, "config", None), "model_type", None) not in KERNEL_MODELS:
        return set()
    return {name for name in names if name.rpartition(".")[2] in KERNEL_LAYERS}


def read_as_experts(net: nn.Module, names: Collection[str]) -> set[str]:
    """The layers that PEFT would read as parts of experts or routers. PEFT reads them correctly if they are listed as
    parameters, `NAME.weight`."""
    former = EXPERT_NAMES.get(expert_layout(net) or "", ())
    return {name for name in names if name.rpartition(".")[2] in former}
