"""The peak of a run from its simulated work: live bytes, the loading of the base, and what a device adds to them."""

import torch

from tunekit.machine.devices import kind_of
from tunekit.planning.simulated.kernels import workspace_bytes
from tunekit.planning.simulated.tracker import Simulation
from tunekit.records import PeakBytes

PARTS = ("weights", "adapter", "optimizer", "activations", "logits")
# What a run on a CPU keeps resident beside live tensors (a GPU's allocator counts those alone): libraries and small
# objects; the kernels that products in 16 bits are compiled to for AVX-512; and freed blocks that malloc keeps, a share
# of all that is not the base's weights, within a bound: blocks too large for malloc's heap are given back.
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
    """Parts are what is live at the highest moment of a step, an evaluation or of sampling; `total` is the peak of the
    run.

    `dtype`: in which it computes.    `cache_bytes`: keys and values of generated answers, beside an evaluation.
    `load_bytes`: the most that loading the base takes, of the host's memory.
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
