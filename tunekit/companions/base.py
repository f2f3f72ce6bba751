"""Makes companions (companions/KIND.py makes the kind KIND), and defines the facts that plan passes to them."""

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
    """Everything that is known before weights are loaded. `base`: on the meta device; `rows`: training rows, then
    evaluation rows; `streams`: whether the rows are only the first rows of a stream."""

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
    """The companions of an objective by key, not loaded yet."""
    return {spec.key: importlib.import_module(f"tunekit.companions.{spec.kind}").make(spec) for spec in specs}


def load_companions(objective: Objective, device: torch.device) -> dict[str, Companion]:
    """The companions of an objective by key, loaded."""
    companions = make_companions(objective.companions)
    for companion in companions.values():
        companion.load(device)
    return companions
