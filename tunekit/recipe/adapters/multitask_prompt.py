"""`adapter: {method: multitask_prompt}` settings of multitask prompt tuning (Wang et al. 2023)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import Count, CountOrZero
from tunekit.recipe.bases.virtual_tokens import StartedTokenSettings


class MultitaskPromptSettings(StartedTokenSettings):
    """One prompt that tasks share, times a low-rank matrix of each task's own. A run trains one task: all its rows are
    of `task`, and init_from brings the others along, which stay as they are."""

    summary = "trained vectors before each row, shared by tasks and scaled for each"

    init: Literal["vocabulary", "random", "text"] = Field(
        "random", description="first values of the shared ones: normal numbers (PEFT's), or as for prompt"
    )
    num_ranks: Count = Field(1, description="rank of a task's matrix")
    num_tasks: Count = Field(1, description="tasks that have a matrix")
    task: CountOrZero = Field(0, description="which of them all rows are of, counted from 0")
    init_from_tasks: Literal["all", "average", "none"] | CountOrZero = Field(
        "all",
        description="of the folder that init_from names: all: every task's matrix; a number: that task's alone; "
        "average: the mean of its tasks' factors; none: its shared vectors alone",
    )

    @model_validator(mode="after")
    def _task_is_there(self) -> MultitaskPromptSettings:
        if self.task >= self.num_tasks:
            raise ValueError(
                f"task is counted from 0, so with num_tasks: {self.num_tasks} it ends at {self.num_tasks - 1}"
            )
        if self.init_from is None and self.init_from_tasks != "all":
            raise ValueError("init_from_tasks goes with init_from, which names the folder")
        if self.init_from_tasks not in ("all", "none") and self.num_tasks != 1:
            raise ValueError("init_from_tasks: a number or average starts one task's matrix, so num_tasks must be 1")
        return self
