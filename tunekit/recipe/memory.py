"""`memory:` what may be traded for memory."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunekit.recipe.bases.section import AutoBoolOrCount, AutoOrBool, Count, Section

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)")
_UNITS = {unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
_UNITS |= {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}


def _size(value: object) -> str:
    if isinstance(value, str) and _SIZE.fullmatch(value) and size_bytes(value):
        return value
    raise ValueError("must be a size with its unit, such as 8GiB")


def size_bytes(text: str) -> int:
    """8GiB -> 8589934592. `text` is a size that the section took."""
    found = _SIZE.fullmatch(text)
    assert found is not None
    return int(float(found[1]) * _UNITS[found[2]])


class MemorySection(Section):
    """`gradient_checkpointing`: auto (what the step needs, never the last layer), true (every layer), false, or the
    number of layers (from the first).

    `activation_offload`: the inputs of recomputed layers wait in the host's memory. auto: on CUDA, inputs of at least
    2 MiB and 512 tokens; true: every input, on a CPU too, where it only costs. Not a bit changes.
    `mlp_tile_tokens`: MLPs and norms compute so many tokens at a time. Sums over tokens are then taken in tiles.
    `budget`: of the device's memory on a GPU; on a CPU, of what the run adds to the process. Within it plan chooses the
    fastest setting: smaller micro-batches at the same rows a step, recomputed layers, fewer logits at a time.
    """

    gradient_checkpointing: AutoBoolOrCount = Field(
        "auto", description="recompute activations: auto, true (every layer), false, or a number of layers"
    )
    activation_offload: AutoOrBool = Field(
        "auto", description="recomputed layers' inputs wait on the host: auto (large ones, on CUDA), true, false"
    )
    mlp_tile_tokens: Count | None = Field(
        None, description="tokens that an MLP computes at a time, for very long rows; sums are taken in tiles"
    )
    streaming: Literal["auto", "off", "host", "disk"] = Field("auto", description="where base weights wait")
    streamed_head: bool = Field(
        False, description="the output projection and the token embedding wait on the host; the former passes in parts"
    )
    budget: Annotated[str, BeforeValidator(_size)] | None = Field(
        None, description="memory to stay in, such as 8GiB: plan chooses the fastest setting that fits"
    )

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.budget is None else size_bytes(self.budget)
