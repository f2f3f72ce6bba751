"""`output:` where the run folder is and who else is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.section import Section


class OutputSection(Section):
    """`report_to`: trackers beside metrics.jsonl."""

    dir: str = Field(min_length=1)
    report_to: tuple[Literal["tensorboard"], ...] = ()
