"""Defines Prepared: everything that planning reads from files and devices, before it decides anything."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import torch

from tunekit.contracts import Batch, Companion, PlanContext
from tunekit.data.batching.steps import BatchSettings, StoredSteps, filled_batch, largest_evaluation_batch
from tunekit.data.batching.stream import StreamedSteps
from tunekit.data.rows import RowSet
from tunekit.errors import Problem
from tunekit.machine.devices import is_here, kind_of
from tunekit.machine.memory import available_bytes, total_bytes
from tunekit.model.loaded_model import LoadedModel, as_loaded
from tunekit.model.storage.packed_cache import cache_room
from tunekit.planning.forecast import Forecast, StoredBase, largest_batch
from tunekit.planning.initialisation import initialisation_bytes
from tunekit.planning.simulation import SimulatedRun
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.recipe import Recipe
from tunekit.records import ExecutionSettings


@dataclass(frozen=True)
class Resources:
    """The device of a rank and its memory. `free_bytes`: free memory of the device; `host_bytes`: free memory of the
    host, None if the device is in another machine; `total_bytes`: all memory of a GPU; `cache_bytes`: the room for a
    packed base in the cache folder; `ranks_here`: how many ranks share this machine's memory."""

    device: torch.device
    free_bytes: int | None = None
    host_bytes: int | None = None
    total_bytes: int | None = None
    cache_bytes: int = 0
    rank: int = 0
    ranks: int = 1
    ranks_here: int = 1


def read_resources(device: torch.device, rank: int = 0, ranks: int = 1) -> Resources:
    """Read the free memory of the device and of the host."""
    return Resources(
        device=device,
        free_bytes=available_bytes(device),
        host_bytes=available_bytes(torch.device("cpu")) if is_here(device) else None,
        total_bytes=None if device.type == "cpu" else total_bytes(device),
        cache_bytes=cache_room(),
        rank=rank,
        ranks=ranks,
        ranks_here=_ranks_here(device, ranks),
    )


def _ranks_here(device: torch.device, ranks: int) -> int:
    """The number of ranks that share this machine's memory: the number that torchrun states, or else all; at most one
    for each GPU of the machine."""
    stated = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = min(int(stated), ranks) if stated.isdecimal() else ranks
    if kind_of(device).numbered and is_here(device):
        here = min(here, torch.get_device_module(device).device_count())
    return max(here, 1)


RunSteps = StoredSteps | StreamedSteps


@dataclass(frozen=True)
class Prepared:
    """The model (without weights), data, adapter and free memory of one rank.

    `loaded`: the recipe as it was read. `recipe`: with this rank's budget, the model section as the objective changes
    it, and token ids in place of the adapter's texts. `context`: the model, the data and the adapter, as companions get
    them. `stored`: the base's files. `rows`: with the objective laid out for the base. `batch_settings`, `steps`: with
    the recipe's micro-batches. `kernels`: the kernels that this rank can use, and the reason as text. `written`: the
    recipe's settings. `problems`: reasons to refuse the recipe that no setting can remove. `notes`: on
    an unused GPU, the time limit, the vocabulary, and tokens that end answers.
    """

    loaded: LoadedRecipe
    recipe: Recipe
    resources: Resources
    context: PlanContext
    stored: StoredBase
    rows: RowSet
    companions: Mapping[str, Companion]
    batch_settings: BatchSettings
    packing_reason: str
    steps: RunSteps
    kernels: tuple[str, str]
    written: ExecutionSettings
    problems: Sequence[Problem] = ()
    notes: Sequence[str] = ()

    @property
    def base(self) -> LoadedModel:
        """The base on the meta device."""
        return as_loaded(self.context.base)

    @cached_property
    def forecast(self) -> Forecast:
        """Predicts the run's memory. It keeps each simulated peak, so that a second plan does not simulate it again."""
        recipe, rows, device = self.recipe, self.rows, self.resources.device
        parts = (self.base, recipe.adapter, rows.objective, recipe.training)
        run = SimulatedRun(*parts, self.written, device, self.companions)
        evaluation, answers = None, 0
        if rows.evaluation is not None and rows.eval_counts is not None:
            size = recipe.evaluation.batch_size
            evaluation = largest_evaluation_batch(rows.evaluation, rows.objective.rows, batch_size=size)
            if recipe.evaluation.generate or recipe.evaluation.samples:
                longest = self.context.virtual_tokens + rows.eval_counts.longest_tokens
                answers = longest + recipe.evaluation.max_new_tokens
        largest, files = cache(partial(self._largest_batch, run)), (self.stored, self.resources.cache_bytes)
        start = initialisation_bytes(recipe.adapter, self.context.targets)
        return Forecast(run, *files, largest, rows.train, evaluation, answers, start)

    def cut(self, micro_batch_size: int | None, count: int) -> tuple[RunSteps, BatchSettings]:
        """The steps and the batch settings with micro-batches of another size. Each step keeps its rows and their
        order. `count`: micro-batches per step."""
        settings = self.batch_settings
        settings = replace(settings, micro_batch_size=micro_batch_size, gradient_accumulation_steps=count)
        return (self.steps if settings == self.batch_settings else self.rows.steps(settings)), settings

    def _largest_batch(self, run: SimulatedRun, micro_batch_size: int | None) -> Batch:
        """The micro-batch that needs the most memory. `micro_batch_size`: rows per micro-batch; None: limited by
        tokens."""
        written, count = self.batch_settings.micro_batch_size, self.batch_settings.gradient_accumulation_steps
        if micro_batch_size is not None and written is not None:
            count = max(1, count * written // micro_batch_size)
        steps, settings = self.cut(micro_batch_size, count)
        train, kind = self.rows.train, self.rows.objective.rows
        if not isinstance(steps, StoredSteps):
            return filled_batch(train, kind, settings)
        largest = largest_batch(steps, train, kind, settings)
        if not self.base.facts.attention.startswith("eager"):
            return largest
        other = largest_batch(steps, train, kind, settings, by_scores=True)
        same = [row.number for row in other.rows] == [row.number for row in largest.rows]
        return other if not same and run.needs_more(other, largest) else largest
