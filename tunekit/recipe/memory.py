"""`memory:` what may be traded for memory."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunekit.recipe.section import AutoBoolOrCount, Section

_SIZE = re.compile(r"[0-9]{1,15}(\.[0-9]{1,9})? ?(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)")


def _size(value: Any) -> Any:
    if isinstance(value, str) and _SIZE.fullmatch(value):
        return value
    raise ValueError("must be a size with its unit, such as 8GiB")


class MemorySection(Section):
    """`gradient_checkpointing`: auto, true (every layer), false, or the number of layers (from the first)."""

    gradient_checkpointing: AutoBoolOrCount = Field(
        "auto", description="recompute activations: auto, true (every layer), false, or a number of layers"
    )
    streaming: Literal["auto", "off", "host", "disk"] = Field("auto", description="where base weights wait")
    budget: Annotated[str, BeforeValidator(_size)] | None = Field(None, description="memory to stay in, such as 8GiB")
