"""The device of a rank and the memory that is free there. Planning reads them once."""

import os
from dataclasses import dataclass

import torch

from tunekit.machine.devices import is_here, kind_of
from tunekit.machine.memory import available_bytes, total_bytes
from tunekit.model.storage.packed_cache import cache_room


@dataclass(frozen=True)
class Resources:
    """The device of a rank and its memory. `free_bytes`: free memory of the device; `host_bytes`: free memory of the
    host, None if the device is in another machine; `total_bytes`: all memory of a GPU; `cache_bytes`: the room for a
    packed base in the cache folder; `ranks_here`: how many ranks share this machine's memory."""

    device: torch.device
    free_bytes: int | None = None
    host_bytes: int | None = None
    total_bytes: int | None = None
    cache_bytes: int = 0
    rank: int = 0
    ranks: int = 1
    ranks_here: int = 1


def read_resources(device: torch.device, rank: int = 0, ranks: int = 1) -> Resources:
    """Read the free memory of the device and of the host."""
    return Resources(
        device=device,
        free_bytes=available_bytes(device),
        host_bytes=available_bytes(torch.device("cpu")) if is_here(device) else None,
        total_bytes=None if device.type == "cpu" else total_bytes(device),
        cache_bytes=cache_room(),
        rank=rank,
        ranks=ranks,
        ranks_here=_ranks_here(device, ranks),
    )


def _ranks_here(device: torch.device, ranks: int) -> int:
    """The number of ranks that share this machine's memory: the number that torchrun states, or else all; at most one
    for each GPU of the machine."""
    stated = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = min(int(stated), ranks) if stated.isdecimal() else ranks
    if kind_of(device).numbered and is_here(device):
        here = min(here, torch.get_device_module(device).device_count())
    return max(here, 1)
