"""Moves small tensors from the host to the device without waiting."""

import torch
from torch import Tensor

from tunekit.machine.devices import kind_of


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. To a GPU it goes through pinned memory, since a copy from pageable memory waits for the
    GPU. float64 becomes float32 on devices without it."""
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
    """The integers of a tensor on the host. If `to_device` moved this tensor to the device, no copy is made."""
    original: Tensor | None = getattr(ids, "from_host", None)
    return ids.to("cpu") if original is None else original
