"""`objective: sft` supervised fine-tuning: next-token cross entropy on the supervised tokens."""

from __future__ import annotations

from typing import Literal

from tunekit.recipe.section import Section


class SftSettings(Section):
    """No settings of its own."""

    method: Literal["sft"] = "sft"
