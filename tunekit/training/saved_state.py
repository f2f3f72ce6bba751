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
from tunekit.targets.export import BUFFER_PREFIX, adapter_buffers
from tunekit.training.optimizers import Optimizer
from tunekit.training.scaling import LossScale
from tunekit.training.state import LoopState


def checkpoint_tensors(optimizer: Optimizer, adapter: AttachedAdapter) -> Tensors:
    """Every tensor that an exact resume needs."""
    buffers = adapter.state(("saved", "resume"))
    return optimizer.state_tensors() | {BUFFER_PREFIX + name: tensor for name, tensor in buffers.items()}


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
    buffers = adapter_buffers(tensors)
    expected = adapter.state(("saved", "resume"))
    if set(buffers) != set(expected):
        raise RunFolderError("the checkpoint's adapter state does not fit this adapter", "resume with the same tunekit")
    optimizer.load_state(tensors, facts["layout"])
    adapter.load_state(buffers, kinds=("saved", "resume"))
    loop = facts["loop"]
    return LoopState(**(loop | {"scale": LossScale(**loop["scale"])}))
