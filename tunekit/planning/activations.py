"""What plan says of activations that wait on the host or are computed in tiles: notes on what was decided."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tunekit.machine.devices import kind_of
from tunekit.recipe.memory import MemorySection
from tunekit.records import bytes_text


def activation_notes(memory: MemorySection, device: torch.device, layers: int, offloaded_bytes: int) -> Iterator[str]:
    """`layers`: how many are recomputed. `offloaded_bytes`: of pinned memory."""
    if offloaded_bytes:
        yield f"the inputs of recomputed layers wait in {bytes_text(offloaded_bytes)} of the host's pinned memory"
    elif memory.activation_offload is True and layers < 2:
        yield "no input waits on the host: at least two layers would have to be recomputed"
    elif memory.activation_offload is True and not kind_of(device).own_memory:
        yield "the inputs of recomputed layers are copied within the one memory that there is, which saves nothing"
    if memory.mlp_tile_tokens is not None:
        yield (
            f"MLPs and norms compute {memory.mlp_tile_tokens:,} tokens at a time: gradients are summed tile by tile, "
            "so not bitwise as without, and dropout inside them draws other masks"
        )
