"""Checks that the methods share which rotate blocks, whose size or number is given; the other one is 0."""

from __future__ import annotations

from typing import Any

from pydantic import Field

BLOCKS: Any = Field(0, description="number of blocks, instead of block_size")


def void_the_other(values: Any) -> Any:
    """Values in which `blocks` alone is written, with a block_size of 0 instead of its default."""
    if isinstance(values, dict) and values.get("blocks") and "block_size" not in values:
        return {**values, "block_size": 0}
    return values


def check_one_is_given(settings: Any) -> Any:
    """Refuse a block_size with a number of blocks, and neither."""
    if bool(settings.block_size) == bool(settings.blocks):
        raise ValueError("give block_size or blocks, not both and not neither")
    return settings
