"""Decides whether a run compiles its layers and which special kernels it uses, and gives the reasons."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from tunekit.adapters.kernels.liger import liger_places
from tunekit.adapters.kernels.native import has_native_places
from tunekit.errors import Problem
from tunekit.machine.devices import kind_of
from tunekit.model.load import LoadedModel
from tunekit.model.native.library import NoKernels, load_kernels
from tunekit.recipe.training import TrainingSection
from tunekit.records import Choice

LEAST_STEPS = 500  # shorter runs end before compiling has saved time
KEY = "training.compile"
AS_DECIDED = "so that all ranks, and a run that is resumed, round the same"
NEW_RUN = "or start a new run in another output.dir"


def planned_compile(
    setting: str | bool, device: torch.device, steps: int, decided: Choice | None = None
) -> tuple[bool, str]:
    """Whether layers are compiled, and the reason as text. `decided`: the choice of the run that is resumed, or of all
    ranks; it is kept, because compiled layers round differently."""
    if isinstance(setting, bool):
        return setting, "as the recipe says"
    if decided is not None:
        return decided.compiled, AS_DECIDED
    if device.type == "cpu":
        return False, "compiled layers are not faster on a CPU"
    if device.type == "mps":
        return False, "torch can compile only few operations for Metal"
    if steps < LEAST_STEPS:
        return False, f"{steps:,} steps are too few (compiling saves time only in runs of {LEAST_STEPS} steps or more)"
    if find_spec("triton") is None:
        return False, "triton is not installed"
    return True, f"{steps:,} steps on a GPU"


def speed_notes(
    training: TrainingSection,
    base: LoadedModel,
    device: torch.device,
    steps: int,
    choice: Choice,
    decided: Choice | None,
) -> Iterator[str]:
    """Notes that say which layers are compiled and which computations kernels replace, and why. `decided`: see
    `planned_compile`."""
    yield from _compile_notes(training.compile, device, steps, choice, decided)
    yield from _kernel_notes(training.kernels, base.net, device, base.dtype, decided)


def _compile_notes(
    setting: str | bool, device: torch.device, steps: int, choice: Choice, decided: Choice | None
) -> list[str]:
    """A note that says whether layers are compiled, and why. Empty if the recipe says `compile: false`."""
    if setting is False:
        return []
    compiled, reason = planned_compile(setting, device, steps, decided)
    if compiled and not choice.compiled:
        compiled, reason = False, "layers that are not always on the device cannot be compiled"
    beside = "; the first step takes longer, and results differ in the last digits" if compiled else ""
    return [f"decoder layers compiled: {'yes' if compiled else 'no'}, {reason}{beside}"]


def compile_problems(
    setting: str | bool, compiled: bool, device: torch.device, whole_model_adapter: bool
) -> Iterator[Problem]:
    """Problems that prevent the compilation of layers. `setting`: the recipe's value; with `auto`, a run that is
    resumed may have been compiled on another machine."""
    if not compiled:
        return
    instead = NEW_RUN if setting == "auto" else "or write compile: false"
    if whole_model_adapter:
        what = "an adapter of the whole model changes the attention, and the changed attention cannot be compiled"
        yield Problem(what, "write compile: false", key=KEY)
    if kind_of(device).own_memory and find_spec("triton") is None:
        yield Problem("compiling for a GPU needs triton", f"run: pip install triton, {instead}", key=KEY)
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        yield Problem("compiling for a CPU needs a C++ compiler", f"install g++, {instead}", key=KEY)


def planned_kernels(
    setting: str, net: nn.Module, device: torch.device, dtype: torch.dtype, decided: Choice | None = None
) -> tuple[str, str]:
    """The kernels of the run (`native`, `liger` or `none`). If the setting is `auto`, also the reason as text.
    `decided`: see `planned_compile`; other kernels round differently."""
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


def _kernel_notes(
    setting: str, net: nn.Module, device: torch.device, dtype: torch.dtype, decided: Choice | None
) -> Iterator[str]:
    """A note that says which computations the kernels replace."""
    kernels, reason = planned_kernels(setting, net, device, dtype, decided)
    if kernels == "liger":
        yield f"liger-kernel computes {len(liger_places(net)[0])} norms, and SwiGLU in MLPs (joined into one function)"
    elif reason:
        can = "yes" if kernels == "native" else "no"
        yield f"kernels in C compute norms, SwiGLU and attention: {can}, {reason}"
