"""`adapter: {method: multitask_prompt}`: settings of multitask prompt tuning (Wang et al. 2023)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import Count, CountOrZero
from tunekit.recipe.bases.virtual_tokens import StartedTokenSettings


class MultitaskPromptSettings(StartedTokenSettings):
    """All tasks share one prompt, which is multiplied by a low-rank matrix of the task. A run trains one task: all its
    rows belong to `task`. The matrices of other tasks are loaded with init_from and do not change."""

    summary = "trained vectors before each row, shared by all tasks and scaled for each task"

    init: Literal["vocabulary", "random", "text"] = Field(
        "random",
        description="initial values of the shared vectors. random: normal numbers, as in PEFT; vocabulary: embeddings "
        "of random tokens; text: embeddings of a text",
    )
    num_ranks: Count = Field(1, description="rank of each task's matrix")
    num_tasks: Count = Field(1, description="number of tasks, each of which has a matrix")
    task: CountOrZero = Field(0, description="the number of the task to which all rows belong, counted from 0")
    init_from_tasks: Literal["all", "average", "none"] | CountOrZero = Field(
        "all",
        description="the matrices to load from the folder of init_from. all: the matrices of all tasks; a number: the "
        "matrix of that task; average: the mean of all tasks' factors; none: only the shared vectors",
    )

    @model_validator(mode="after")
    def _task_is_there(self) -> MultitaskPromptSettings:
        if self.task >= self.num_tasks:
            raise ValueError(
                f"task is counted from 0, so with num_tasks: {self.num_tasks} its maximum is {self.num_tasks - 1}"
            )
        if self.init_from is None and self.init_from_tasks != "all":
            raise ValueError("init_from_tasks needs init_from, which names the folder")
        if self.init_from_tasks not in ("all", "none") and self.num_tasks != 1:
            raise ValueError(
                "init_from_tasks can be a number or average only with num_tasks: 1, because it initialises one matrix"
            )
        return self
