"""Decides which special kernels a run uses, and gives the reasons."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from tunekit.adapters.kernels.liger import liger_places
from tunekit.adapters.kernels.native import has_native_places
from tunekit.errors import Problem
from tunekit.machine.devices import kind_of
from tunekit.machine.environment import library_versions
from tunekit.model.compute import kernel_packages
from tunekit.model.native.library import NoKernels, load_kernels
from tunekit.records import ExecutionSettings

AS_DECIDED = "so that all ranks, and a run that is resumed, round the same"
NEW_RUN = "or start a new run in another output.dir"


def planned_kernels(setting: str, net: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The kernels of the run (`native`, `liger` or `none`). If the setting is `auto` and kernels in C could compute the
    base, also the reason as text."""
    if setting != "auto":
        return setting, ""
    if device.type != "cpu" or dtype != torch.bfloat16 or not has_native_places(net):
        return "none", ""
    try:
        load_kernels()
    except NoKernels as error:
        return "none", str(error)
    return "native", "bfloat16 on a CPU with a C compiler"


def decided_kernels(setting: str, kernels: tuple[str, str], fixed: ExecutionSettings | None) -> tuple[str, str]:
    """The kernels of the run, and the reason. `kernels`: those that this rank would choose. `fixed`: the settings of
    the run that is resumed, or of all ranks; their kernels are kept, because other kernels round differently."""
    if fixed is None or setting != "auto":
        return kernels
    return fixed.kernels, AS_DECIDED if kernels[1] or fixed.kernels == "native" else ""


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


def kernel_notes(kernels: str, reason: str, net: nn.Module, device: torch.device) -> Iterator[str]:
    """Notes that say which computations the kernels replace, and why, and which packages would compute the recurrent
    layers faster on this device."""
    missing = [package for package in kernel_packages(net) if package not in library_versions()]
    if missing and kind_of(device).own_memory:
        names = ", ".join(missing)
        yield f"torch computes the recurrent layers, which is correct but slow; for faster kernels, install {names}"
    if kernels == "liger":
        yield f"liger-kernel computes {len(liger_places(net)[0])} norms, and SwiGLU in MLPs (joined into one function)"
    elif reason:
        can = "yes" if kernels == "native" else "no"
        yield f"kernels in C compute norms, SwiGLU and attention: {can}, {reason}"
