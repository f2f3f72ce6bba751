"""Decides which special kernels a run uses, and gives the reasons."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from tunekit.adapters.kernels.liger import liger_places
from tunekit.adapters.kernels.native import has_native_places
from tunekit.errors import Problem
from tunekit.machine.devices import kind_of
from tunekit.model.native.library import NoKernels, load_kernels
from tunekit.records import ExecutionSettings

AS_DECIDED = "so that all ranks, and a run that is resumed, round the same"
NEW_RUN = "or start a new run in another output.dir"


def planned_kernels(
    setting: str, net: nn.Module, device: torch.device, dtype: torch.dtype, decided: ExecutionSettings | None = None
) -> tuple[str, str]:
    """The kernels of the run (`native`, `liger` or `none`). If the setting is `auto`, also the reason as text.
    `decided`: the choice of the run that is resumed, or of all ranks; it is kept, because other kernels round
    differently."""
    if setting != "auto":
        return setting, ""
    suitable = device.type == "cpu" and dtype == torch.bfloat16 and has_native_places(net)
    if decided is not None:
        return decided.kernels, AS_DECIDED if suitable or decided.kernels == "native" else ""
    if not suitable:
        return "none", ""
    try:
        load_kernels()
    except NoKernels as error:
        return "none", str(error)
    return "native", "bfloat16 on a CPU with a C compiler"


def kernel_problems(kernels: str, device: torch.device) -> Iterator[Problem]:
    """Problems that prevent the use of the run's kernels."""
    if kernels == "native":
        try:
            load_kernels()
        except NoKernels as error:
            what = f"the run that is resumed uses kernels in C, which round differently, but {error}"
            yield Problem(what, f"resume it where it ran before, {NEW_RUN}", key="training.kernels")
    if kernels != "liger":
        return
    if not kind_of(device).own_memory:
        yield Problem("liger-kernel's kernels run on a GPU only", "write kernels: none", key="training.kernels")
    elif find_spec("liger_kernel") is None:
        how = "run: pip install liger-kernel, or write kernels: none"
        yield Problem("liger-kernel is not installed", how, key="training.kernels")


def kernel_notes(
    setting: str, net: nn.Module, device: torch.device, dtype: torch.dtype, decided: ExecutionSettings | None
) -> Iterator[str]:
    """A note that says which computations the kernels replace, and why. `decided`: see `planned_kernels`."""
    kernels, reason = planned_kernels(setting, net, device, dtype, decided)
    if kernels == "liger":
        yield f"liger-kernel computes {len(liger_places(net)[0])} norms, and SwiGLU in MLPs (joined into one function)"
    elif reason:
        can = "yes" if kernels == "native" else "no"
        yield f"kernels in C compute norms, SwiGLU and attention: {can}, {reason}"
