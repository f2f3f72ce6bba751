"""Scores a tuned model and its base on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunekit.contracts import Objective, Progress, no_progress
from tunekit.evaluation.tasks.run import TaskDifference, Tasks, TaskScore, run_tasks, task_differences
from tunekit.machine.devices import Devices
from tunekit.model.call import calling, current_call
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.tuned.model import TunedModel


@dataclass(frozen=True)
class TaskResults:
    """The scores of a model on tasks. `before`: the scores of its base; empty if the base was not scored."""

    scores: Sequence[TaskScore]
    before: Sequence[TaskScore] = ()

    @property
    def differences(self) -> list[TaskDifference]:
        """For each metric, how much tuning changed it."""
        return task_differences(self.before, self.scores)

    def values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {"scores": self.scores, "before": self.before}
        scores = {
            name: [{key: value for key, value in asdict(each).items() if key != "documents"} for each in part]
            for name, part in parts.items()
        }
        return scores | {"changes": [asdict(each) | {"verdict": each.verdict} for each in self.differences]}


def measure_tasks(
    model: TunedModel,
    tokenizer: LoadedTokenizer,
    objective: Objective,
    tasks: Tasks,
    devices: Devices,
    *,
    compares: bool,
    template: str | None = None,
    progress: Progress = no_progress,
) -> TaskResults:
    """Score the model on tasks. `compares`: also score its base, by bypassing the adapter. `template`: a chat template
    that replaces the tokenizer's own."""
    before: Sequence[TaskScore] = ()
    if compares:
        with calling(replace(current_call(), bypassed=True)):
            before = run_tasks(model, tokenizer, objective, tasks, devices, progress, template)
    return TaskResults(run_tasks(model, tokenizer, objective, tasks, devices, progress, template), before)
