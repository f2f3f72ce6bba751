"""The peak memory of a run, calculated from three numbers: simulated live bytes, memory for loading the base, and
overhead of the device."""

import torch

from tunekit.machine.devices import kind_of
from tunekit.planning.simulated.kernels import workspace_bytes
from tunekit.planning.simulated.tracker import Simulation
from tunekit.records import PeakBytes

PARTS = ("weights", "adapter", "optimizer", "activations", "logits")
# Resident memory of a run on a CPU besides live tensors (a GPU's allocator counts only tensors): libraries and small
# objects; the kernels that are compiled for products in 16 bits with AVX-512; and freed blocks that malloc keeps. These
# blocks are a share of all memory except the base's weights, up to a bound, because malloc returns very large blocks.
# Source: scripts/results/memory.md.
PROCESS_BYTES, COMPILED_BYTES = 100_000_000, 15_000_000
KEPT_SHARE = 0.20
MOST_KEPT_BYTES = 500_000_000


def peak_bytes(
    step: Simulation,
    evaluation: Simulation | None,
    sampling: Simulation | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cache_bytes: int = 0,
    load_bytes: int = 0,
) -> PeakBytes:
    """The peak memory of the run. Its parts are those of the largest simulation: a step, an evaluation or sampling.

    `dtype`: the dtype of the computation. `cache_bytes`: keys and values of generated answers, added to an evaluation.
    `load_bytes`: the peak of host memory while the base is loaded.
    """
    evaluated = 0 if evaluation is None else evaluation.total
    highest = max((each for each in (step, evaluation, sampling) if each is not None), key=lambda each: each.total)
    total = max(highest.total, evaluated + cache_bytes)
    if device.type == "cpu":
        kept = min(round(KEPT_SHARE * (total - highest.peak.get("weights", 0))), MOST_KEPT_BYTES)
        compiles = dtype.itemsize == 2 and "AVX512" in torch.backends.cpu.get_cpu_capability()
        total = max(total + kept, load_bytes) + PROCESS_BYTES + (COMPILED_BYTES if compiles else 0)
    elif not kind_of(device).own_memory:
        total = max(total, load_bytes)
    total += workspace_bytes(device)
    return PeakBytes(**{name: highest.peak.get(name, 0) for name in PARTS}, total=total)
