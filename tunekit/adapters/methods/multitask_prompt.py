"""Multitask prompt tuning, for any network with a token embedding."""

from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from tunekit.adapters.base import Slot, Slots
from tunekit.adapters.blocks.virtual_tokens import (
    ABSENT,
    FIELDS,
    START_FIELDS,
    VirtualTokens,
    initial_vectors,
    width_of,
)
from tunekit.adapters.folder.fields import ANY, PeftSide
from tunekit.adapters.methods.prompt import METHOD as PROMPT
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.multitask_prompt import MultitaskPromptSettings

SPREAD = 0.02  # initial standard deviation of the tasks' factors, as in PEFT


class MultitaskPrompt(VirtualTokens[MultitaskPromptSettings]):
    """P_task = P * (C_task R_task), element by element.

    Shapes: P (P, D); C (tasks, P, R); R (tasks, R, D). A call may pass each row's task as task_ids (B,); by default
    all rows belong to settings.task. In an encoder-decoder the second half of P is for the decoder.
    Source: Wang et al. 2023, eq. 1.
    """

    prompts_decoder = True

    columns: nn.Parameter
    rows: nn.Parameter

    @classmethod
    def slots(cls, settings: MultitaskPromptSettings, net: nn.Module) -> Slots:
        vectors, width, tasks = cls.vector_count(settings), width_of(net), settings.num_tasks
        return {
            **super().file_slots(settings, net),
            "columns": Slot("prefix_task_cols", (tasks, vectors, settings.num_ranks), decays=False),
            "rows": Slot("prefix_task_rows", (tasks, settings.num_ranks, width), decays=False),
        }

    @classmethod
    def file_slots(cls, settings: MultitaskPromptSettings, net: nn.Module) -> Slots:
        return cls.slots(settings, net)

    def initialise(self, generator: Generator) -> None:
        self.prompt.data.copy_(initial_vectors(self.net, self.settings, self.prompt.shape[0], generator))
        nn.init.normal_(self.columns, std=SPREAD, generator=generator)
        nn.init.normal_(self.rows, std=SPREAD, generator=generator)

    def vectors(self, tasks: Tensor | None) -> Tensor:
        if tasks is None:
            return self.prompt * (self.columns[self.settings.task] @ self.rows[self.settings.task])
        if bool(((tasks < 0) | (tasks >= self.settings.num_tasks)).any()):
            what = f"a row has an unknown task; there are {self.settings.num_tasks} tasks"
            raise AdapterError(what, f"number the tasks of the rows from 0 to {self.settings.num_tasks - 1}")
        return self.prompt * torch.bmm(self.columns[tasks], self.rows[tasks])  # (B, P, D)

    @classmethod
    def may_differ(cls, settings: MultitaskPromptSettings) -> frozenset[str]:
        return frozenset() if settings.init_from_tasks == "all" else frozenset({"num_tasks"})

    def continued_state(self, tensors: Tensors) -> Tensors:
        """The initial tensors, computed from the tensors of a folder. The setting `init_from_tasks` selects the
        folder's tasks to use.

        A number is PEFT's EXACT_SOURCE_TASK, "average" is AVERAGE_SOURCE_TASKS, and "none" is ONLY_SOURCE_SHARED.

        Raises: AdapterError if the folder has no such task.
        """
        chosen, factors = self.settings.init_from_tasks, ("prefix_task_cols", "prefix_task_rows")
        if chosen == "all":
            return tensors
        if chosen == "none":
            return {**tensors, **{name: self.state()[name].detach() for name in factors}}
        if chosen == "average":
            return {**tensors, **{name: tensors[name].mean(0, keepdim=True) for name in factors}}
        count = len(tensors[factors[0]])
        if chosen >= count:
            what = f"the folder has the tasks 0 to {count - 1}, so there is no task {chosen}"
            raise AdapterError(what, "choose one of them", key="adapter.init_from_tasks")
        return {**tensors, **{name: tensors[name][chosen : chosen + 1] for name in factors}}

    def file_tensors(self) -> Tensors:
        """The trained tensors of all tasks."""
        return self.state(("trained",))


METHOD = replace(
    PROMPT,
    peft=PeftSide(
        "MULTITASK_PROMPT_TUNING",
        MultitaskPromptSettings,
        {**FIELDS, "num_ranks": ("num_ranks", 1), "num_tasks": ("num_tasks", 1)},
        {
            **START_FIELDS,
            "prompt_tuning_init_state_dict_path": (None, ANY),  # a file on the training machine: never read
            "prompt_tuning_init_task": (0, ANY),
        },
        absent=ABSENT,
    ),
    model=MultitaskPrompt,
    unbinding=PROMPT.unbinding | {"task", "init_from_tasks"},  # a folder contains all tasks
)
