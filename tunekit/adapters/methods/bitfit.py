"""BitFit, for every module of a base that has a bias, quantized or not.

PEFT has no such type: `peft_type: BITFIT` marks a folder that only tunekit reads. After PEFT's prefix, its tensors have
the names that they have in the base, so they are easy to compare with biases from other tools.
"""

from tunekit.adapters.blocks.chosen_modules import chosen_names
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.method import Method, always_linear
from tunekit.contracts import Modules
from tunekit.recipe.adapters.bitfit import BitfitSettings


def chosen_biases(modules: Modules, settings: BitfitSettings) -> dict[str, tuple[str, ...]]:
    """The bias of each chosen module, trained as a float32 copy without weight decay.

    Source: Ben Zaken et al. 2022.
    """
    owners = [n for n, m in modules.items() if any(name == "bias" for name, _ in m.named_parameters(recurse=False))]
    return dict.fromkeys(chosen_names(owners, settings.target_modules, "all-biases", "bias"), ("bias",))


METHOD = Method(
    peft=PeftSide("BITFIT", BitfitSettings, {"target_modules": ("target_modules", "all-biases")}),
    only_copies=chosen_biases,
    tensors=("bias",),
    is_linear=always_linear,
)
