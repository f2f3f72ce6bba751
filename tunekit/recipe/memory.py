"""`memory:` settings that save memory. They cost time, or change the order of sums."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunekit.recipe.bases.section import AutoBoolOrCount, AutoOrBool, Count, Section
from tunekit.recipe.reading.suggest import show

NO_SIZE = "must be a size with its unit, such as 8GiB"
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)")
_UNITS = {unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
_UNITS |= {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}


def _size(value: object) -> str:
    if size_bytes(value if isinstance(value, str) else "") == 0:
        raise ValueError("must be at least 1 byte")
    return str(value)


def _sizes(value: object) -> str | tuple[str, ...]:
    if not isinstance(value, list | tuple):
        return _size(value)
    if len(value) < 2:
        raise ValueError("a list needs the sizes of two ranks or more; write a single size without brackets")
    for rank, size in enumerate(value):
        try:
            _size(size)
        except ValueError as error:
            raise ValueError(f"the budget of rank {rank} {error}, not {show(size)}") from None
    return tuple(value)


def size_bytes(text: str) -> int:
    """The number of bytes of a size such as 8GiB. Raises: ValueError if the text is not a size."""
    size = _SIZE.fullmatch(text)
    if size is None:
        raise ValueError(NO_SIZE)
    return int(float(size[1]) * _UNITS[size[2]])


class MemorySection(Section):
    """Settings that save memory. `gradient_checkpointing`: the layers whose activations are recomputed in the backward
    pass. auto: as few layers as memory allows, never the last layer; a number counts layers from the first.

    `activation_offload`: stores the inputs of recomputed layers in the host's memory. auto: on CUDA, inputs of at least
    2 MiB and 512 tokens, if the host has room for them. true: all inputs; on a CPU, this saves nothing. The results are
    equal bit for bit.
    `mlp_tile_tokens`: MLPs and norms compute this many tokens at a time. This changes the order of sums over tokens.
    `budget`: on a GPU, a limit for the device's memory; on a CPU, a limit for the memory that the run adds to the
    process. The plan then uses the fastest settings that fit: smaller micro-batches with the same number of rows per
    step, recomputed layers, or smaller chunks of logits. With a list, each rank recomputes and streams as its own
    budget requires; the smallest budget decides the micro-batches.
    """

    gradient_checkpointing: AutoBoolOrCount = Field(
        "auto",
        description="recompute activations in the backward pass: auto (in as few layers as memory allows), true (all "
        "layers), false, or a number of layers",
    )
    activation_offload: AutoOrBool = Field(
        "auto",
        description="store the inputs of recomputed layers in the host's memory: auto (only large inputs, on CUDA), "
        "true, false",
    )
    mlp_tile_tokens: Count | None = Field(
        None,
        description="number of tokens that an MLP computes at a time, for very long rows; changes the order of sums",
    )
    streaming: Literal["auto", "off", "host", "disk"] = Field(
        "auto",
        description="where the base's weights are stored until a layer needs them. off: on the device; auto: on the "
        "device if the run fits",
    )
    sharding: Literal["auto", "off", "full"] = Field(
        "auto",
        description="with several ranks, what each of them stores of the base. off: all of it; full: an equal share; "
        "auto: a share only if the run would not fit otherwise",
    )
    streamed_head: bool = Field(
        False,
        description="store the output projection and the token embedding in the host's memory; the projection is "
        "copied to the device in parts",
    )
    budget: Annotated[str | tuple[str, ...], BeforeValidator(_sizes)] | None = Field(
        None,
        description="a memory limit, such as 8GiB, or a list with the limit of each rank; the run uses the fastest "
        "settings that fit",
    )

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes; the smallest of several."""
        least = self.of_rank(0, 0).budget
        return None if least is None else size_bytes(str(least))

    def of_rank(self, rank: int, ranks: int) -> MemorySection:
        """A copy with the budget of this rank. If the list has not one budget for each of the `ranks`, the smallest
        counts."""
        if self.budget is None or isinstance(self.budget, str):
            return self
        own = self.budget[rank] if len(self.budget) == ranks else min(self.budget, key=size_bytes)
        return self.model_copy(update={"budget": own})
