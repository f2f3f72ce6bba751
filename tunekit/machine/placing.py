"""Small tensors of the host on their way to the device, without a wait.

Comes in: a tensor on the host.  Goes out: the same on the device.
"""

import torch
from torch import Tensor

from tunekit.machine.devices import kind_of


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; to a GPU it goes from pinned memory, since a copy from any other waits for the GPU.
    float64 becomes float32 where the device has none."""
    kind, given = kind_of(device), tensor
    if tensor.dtype == torch.float64 and not kind.float64:
        tensor = tensor.float()
    if kind.own_memory and tensor.device.type == "cpu":
        there = tensor.pin_memory().to(device, non_blocking=True)
        if not tensor.is_floating_point():
            there.from_host = given  # type: ignore[attr-defined]
        return there
    return tensor.to(device)


def on_host(ids: Tensor) -> Tensor:
    """Integers on the host: those that `placed` sent, without a wait; others are copied back."""
    known: Tensor | None = getattr(ids, "from_host", None)
    return ids.to("cpu") if known is None else known
