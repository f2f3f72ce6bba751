"""Interfaces of companions, and the facts that `plan` passes to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.contracts.model import Head, LoadedBase, Model
from tunekit.contracts.objective import CompanionSpec, Objective, RunView
from tunekit.contracts.rows import Batch, Processor, Rows
from tunekit.errors import Problem
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.training import TrainingSection
from tunekit.records import Target


@dataclass(frozen=True)
class PlanContext:
    """The facts that `plan` knows before weights are loaded. `base`: the base on the meta device; `rows`: training
    rows, then evaluation rows; `streams`: whether the data is streamed, so that `rows` contains only its first rows."""

    device: torch.device
    base: LoadedBase
    processor: Processor
    objective: Objective
    rows: Sequence[Rows]
    streams: bool
    memory: MemorySection
    training: TrainingSection
    evaluation: EvaluationSection
    targets: Sequence[Target] = ()
    virtual_tokens: int = 0


@dataclass(frozen=True)
class CompanionFacts:
    """Facts about a companion that `plan` knows before any weights are loaded.

    `weight_bytes`: the size of its weights, if they are in memory during the whole run and no simulation counts them.
    `any_token`: whether the model may read any token of its vocabulary, not only tokens of the rows.
    `streaming_obstacle`: why the base cannot be streamed in a run with this companion; None if it can be streamed.
    `usable`: False if a run with this companion cannot be simulated.
    """

    weight_bytes: int = 0
    problems: Sequence[Problem] = ()
    any_token: bool = False
    streaming_obstacle: str | None = None
    usable: bool = True


CountingAs = Callable[[str], AbstractContextManager[None]]  # name of a memory part -> a block counted under it


class Companion:
    """A part of a run besides the trained model: a teacher, reward models, parts of a pipeline, or sampling.

    Each kind is defined in companions/KIND.py. Its base class is the protocol that its loss declares, next to the loss.
    RunView.companion finds it by this class. `rehearses`: whether the method `rehearse` simulates any work.
    """

    head: Head | None = None  # if the loss reads the companion's output projection
    writes = True  # whether `begin` may write files; false in a dry run
    rehearses, sampling_batch_size = False, 0  # sampling_batch_size: completions sampled in parallel, as plan decided

    def __init__(self, spec: CompanionSpec) -> None:
        self.spec, self.key = spec, spec.key

    def facts(self, planned: PlanContext) -> CompanionFacts:
        """The companion's facts for the plan."""
        return CompanionFacts()

    def notes(self, planned: PlanContext, step_tokens: int) -> Sequence[str]:
        """The companion's notes for the plan. `step_tokens`: the tokens of the largest step, including padding."""
        return ()

    def fingerprint(self) -> Mapping[str, str]:
        """The sha256 of files that affect the results, by recipe key. A resume first checks these files."""
        return {}

    def load(self, device: torch.device) -> None:
        """Load the companion."""

    def begin(self, run: RunView, rows: Sequence[Rows]) -> Mapping[str, str]:
        """Prepare values that all steps need (class images, latents), before the first step and after a resume. Returns
        the sha256 of the files read, by recipe key. A resume is refused if a file changed."""
        return {}

    def simulated(self) -> Companion:
        """A copy on the meta device, for one simulated step."""
        return self

    def resident(self, device: torch.device) -> Sequence[Tensor]:
        """The tensors of a simulated companion that are on the device in every step."""
        return ()

    def present(self, model: Model) -> Sequence[Tensor]:
        """The tensors that are on the device only while `rehearse` runs."""
        return ()

    def rehearse(self, run: RunView, batch: Batch, counting_as: CountingAs) -> None:
        """Simulate the companion's work that needs the most memory, with the largest batch of the run."""
