"""The content of a checkpoint and how it is restored: weights, optimizer, adapter buffers, loop state, thread count.

It contains no state of random generators: every random number is a function of (seed, step, place).
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
from tunekit.targets.export import BUFFER_PREFIX, REFERENCE_PREFIX, with_prefix
from tunekit.training.optimizers import Optimizer
from tunekit.training.scaling import LossScale
from tunekit.training.state import LoopState


def checkpoint_tensors(
    optimizer: Optimizer, adapter: AttachedAdapter, reference: Mapping[str, Tensor] | None = None
) -> Tensors:
    """All tensors that an exact resume needs. `reference`: the adapter's state at step 0; None if the loss does not
    need it."""
    buffers = {BUFFER_PREFIX + name: tensor for name, tensor in adapter.state(("saved", "resume")).items()}
    reference_tensors = {REFERENCE_PREFIX + name: tensor for name, tensor in (reference or {}).items()}
    return optimizer.state_tensors() | buffers | reference_tensors


def checkpoint_facts(optimizer: Optimizer, state: LoopState, fingerprint: Mapping[str, Any]) -> JsonObject:
    """All values that an exact resume needs, except tensors."""
    return {
        "loop": asdict(state),
        "layout": optimizer.layout(),
        "fingerprint": dict(fingerprint),
        "threads": torch.get_num_threads(),
    }


def restore(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], optimizer: Optimizer, adapter: AttachedAdapter
) -> LoopState:
    """Restore a checkpoint and return its loop state.

    Raises: RunFolderError if the checkpoint does not fit the adapter or the optimizer.
    """
    buffers = with_prefix(tensors, BUFFER_PREFIX)
    expected = adapter.state(("saved", "resume"))
    if set(buffers) != set(expected):
        raise RunFolderError(
            "the checkpoint's adapter state does not fit this adapter", "resume with the tunekit version that wrote it"
        )
    optimizer.load_state(tensors, facts["layout"])
    adapter.load_state(buffers, kinds=("saved", "resume"))
    loop = facts["loop"]
    return LoopState(**(loop | {"scale": LossScale(**loop["scale"])}))


def restore_reference(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's reference state into the given tensors.

    Raises: RunFolderError if the checkpoint has no reference state, or the state of a different adapter.
    """
    saved = with_prefix(tensors, REFERENCE_PREFIX)
    if set(saved) != set(targets) or any(saved[name].shape != tensor.shape for name, tensor in targets.items()):
        what = "the checkpoint contains no state of the reference model that fits this adapter"
        raise RunFolderError(what, "resume with the tunekit version that wrote it")
    for name, tensor in targets.items():
        tensor.copy_(saved[name])
