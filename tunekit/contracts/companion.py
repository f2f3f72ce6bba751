"""Interfaces of companions, and the facts that `plan` passes to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tunekit.contracts.model import Head, LoadedBase, Model
from tunekit.contracts.objective import CompanionSpec, RunView
from tunekit.contracts.rows import Batch, Processor, Rows
from tunekit.errors import Problem
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings, Target


@dataclass(frozen=True)
class PlanContext:
    """What `plan` knows before weights are loaded. `base`: the base on the meta device; `rows`: training rows, then
    evaluation rows; `streams`: whether the data is streamed, so that `rows` contains only its first rows."""

    device: torch.device
    base: LoadedBase
    processor: Processor
    rows: Sequence[Rows]
    streams: bool
    memory: MemorySection
    training: TrainingSection
    evaluation: EvaluationSection
    targets: Sequence[Target]
    virtual_tokens: int


CountingAs = Callable[[str], AbstractContextManager[None]]  # name of a memory part -> a block counted under it


class Companion:
    """A part of a run besides the trained model: a teacher, reward models, parts of a pipeline, or sampling.

    Each kind is defined in companions/KIND.py. Its base class is the protocol that its loss declares, next to the loss.
    RunView.companion finds it by this class.

    `head`: the companion's output projection, if the loss reads it. `writes`: whether `begin` may write files; false in
    a dry run. `rehearses`: whether the method `rehearse` simulates any work. `sampling_batch_size`: how many
    completions are sampled in parallel; in a plan, how many at most. `any_token`: whether the model may read any token
    of its vocabulary, not only tokens of the rows. `weight_bytes`: the size of the companion's weights, if they are in
    memory during the whole run and no simulation counts them. `streaming_obstacle`: why the base cannot be streamed in
    a run with this companion; None if it can be.
    """

    head: Head | None = None
    writes = True
    rehearses = any_token = False
    sampling_batch_size = weight_bytes = 0
    streaming_obstacle: str | None = None

    def __init__(self, spec: CompanionSpec) -> None:
        self.spec, self.key = spec, spec.key

    def examine(self, planned: PlanContext) -> Sequence[Problem]:
        """Find all facts for the plan, before any weights are loaded. Returns the problems of a run with this
        companion. Raises: TunekitError if such a run cannot be simulated."""
        return ()

    def notes(self, planned: PlanContext, execution: ExecutionSettings, tokens: int) -> Sequence[str]:
        """The companion's notes for the plan. `tokens`: the tokens of the largest micro-batch, including padding."""
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

    def simulated(self) -> Self:
        """A copy on the meta device, for one simulated step."""
        return self

    def resident(self, device: torch.device) -> Sequence[Tensor]:
        """The tensors of a simulated companion that are on the device in every step."""
        return ()

    def present(self, model: Model) -> Sequence[Tensor]:
        """The tensors that are on the device only while `rehearse` runs."""
        return ()

    def rehearse(self, run: RunView, batch: Batch, execution: ExecutionSettings, counting_as: CountingAs) -> None:
        """Simulate the companion's work that needs the most memory, with the largest batch of the run."""
