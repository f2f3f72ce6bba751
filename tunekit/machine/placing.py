"""Moves small tensors from the host to the device without waiting."""

import torch
from torch import Tensor

from tunekit.machine.devices import kind_of


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`. The copy to a GPU uses pinned memory, because a copy from pageable memory would wait
    for the GPU. float64 becomes float32 if the device has no float64."""
    kind, original = kind_of(device), tensor
    if tensor.dtype == torch.float64 and not kind.float64:
        tensor = tensor.float()
    if kind.own_memory and tensor.device.type == "cpu":
        there = tensor.pin_memory().to(device, non_blocking=True)
        if not tensor.is_floating_point():
            there.from_host = original  # type: ignore[attr-defined]
        return there
    return tensor.to(device)


def on_host(ids: Tensor) -> Tensor:
    """The tensor on the host. If `to_device` has moved integers to the device, their original is returned without a
    copy."""
    original: Tensor | None = getattr(ids, "from_host", None)
    return ids.to("cpu") if original is None else original
