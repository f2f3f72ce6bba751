"""What a checkpoint holds, and how it is put back: weights, optimizer, adapter buffers, loop state, thread count.

There is no state of random generators: every random number is a function of (seed, step, place).
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.contracts import Tensors
from tunekit.errors import RunFolderError
from tunekit.records import JsonObject
from tunekit.targets.export import BUFFER_PREFIX, REFERENCE_PREFIX, prefixed
from tunekit.training.optimizers import Optimizer
from tunekit.training.scaling import LossScale
from tunekit.training.state import LoopState


def checkpoint_tensors(
    optimizer: Optimizer, adapter: AttachedAdapter, reference: Mapping[str, Tensor] | None = None
) -> Tensors:
    """Every tensor that an exact resume needs; `reference`: the adapter's state at step 0, where the loss reads it."""
    buffers = {BUFFER_PREFIX + name: tensor for name, tensor in adapter.state(("saved", "resume")).items()}
    kept = {REFERENCE_PREFIX + name: tensor for name, tensor in (reference or {}).items()}
    return optimizer.state_tensors() | buffers | kept


def checkpoint_facts(optimizer: Optimizer, state: LoopState, fingerprint: Mapping[str, Any]) -> JsonObject:
    """Every plain value that an exact resume needs."""
    return {
        "loop": asdict(state),
        "layout": optimizer.layout(),
        "fingerprint": dict(fingerprint),
        "threads": torch.get_num_threads(),
    }


def restore(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], optimizer: Optimizer, adapter: AttachedAdapter
) -> LoopState:
    """Put a checkpoint back and return the loop state saved with it.

    Raises: RunFolderError where it does not fit.
    """
    buffers = prefixed(tensors, BUFFER_PREFIX)
    expected = adapter.state(("saved", "resume"))
    if set(buffers) != set(expected):
        raise RunFolderError("the checkpoint's adapter state does not fit this adapter", "resume with the same tunekit")
    optimizer.load_state(tensors, facts["layout"])
    adapter.load_state(buffers, kinds=("saved", "resume"))
    loop = facts["loop"]
    return LoopState(**(loop | {"scale": LossScale(**loop["scale"])}))


def restore_reference(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's reference state into the tensors that keep it.

    Raises: RunFolderError where it has none, or one of another adapter.
    """
    saved = prefixed(tensors, REFERENCE_PREFIX)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: each.shape for name, each in kept.items()}:
        what = "the checkpoint has no state of the reference model that fits this adapter"
        raise RunFolderError(what, "resume with the same tunekit")
    for name, tensor in kept.items():
        tensor.copy_(saved[name])
