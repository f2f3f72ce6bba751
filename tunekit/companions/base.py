"""Makes an objective's companions: other models or functions that its loss needs, such as a teacher or reward models.
Also defines PlanContext, which `plan` passes to companions."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunekit.contracts import Companion, CompanionSpec, Objective, Processor, Rows
from tunekit.model.load import LoadedModel
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.training import TrainingSection
from tunekit.records import Target


@dataclass(frozen=True)
class PlanContext:
    """The facts that `plan` knows before weights are loaded. `base`: the base on the meta device; `rows`: training
    rows, then evaluation rows; `streams`: whether the data is streamed, so that `rows` contains only its first rows."""

    device: torch.device
    base: LoadedModel
    processor: Processor
    objective: Objective
    rows: Sequence[Rows]
    streams: bool
    memory: MemorySection
    training: TrainingSection
    evaluation: EvaluationSection
    targets: Sequence[Target] = ()
    virtual_tokens: int = 0


def make_companions(specs: Sequence[CompanionSpec]) -> dict[str, Companion]:
    """Make the companions from these specs, by recipe key. Their weights are not loaded yet."""
    return {spec.key: importlib.import_module(f"tunekit.companions.{spec.kind}").make(spec) for spec in specs}


def load_companions(objective: Objective, device: torch.device) -> dict[str, Companion]:
    """Make and load the companions of an objective, by recipe key."""
    companions = make_companions(objective.companions)
    for companion in companions.values():
        companion.load(device)
    return companions
