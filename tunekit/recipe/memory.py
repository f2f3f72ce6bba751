"""`memory:` what may be traded for memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunekit.recipe.section import CountOrZero, Section


class MemorySection(Section):
    """`gradient_checkpointing`: auto, true (every layer), false, or the number of layers (from the first)."""

    gradient_checkpointing: Literal["auto"] | bool | CountOrZero = "auto"
    streaming: Literal["auto", "off", "host", "disk"] = "auto"
    budget: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)? ?(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)$")] | None = None
