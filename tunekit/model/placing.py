"""Small tensors of the host on their way to the device, without a wait.

Comes in: a tensor on the host.  Goes out: the same on the device.
"""

from __future__ import annotations

import torch

from tunekit.machine.devices import kind_of


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; to a GPU it goes from pinned memory, since a copy from any other waits for the GPU.
    float64 becomes float32 where the device has none."""
    kind = kind_of(device)
    if tensor.dtype == torch.float64 and not kind.float64:
        tensor = tensor.float()
    if kind.own_memory and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
