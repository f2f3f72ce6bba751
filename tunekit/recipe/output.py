"""`output:` the run folder and the trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.section import Section, Several, Text


class OutputSection(Section):
    """The run folder and the trackers beside metrics.jsonl."""

    dir: Text = Field(description="the run folder")
    report_to: Several[Literal["tensorboard"]] = Field((), description="trackers beside metrics.jsonl")
