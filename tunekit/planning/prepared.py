"""Defines Prepared: everything that planning reads from files and devices, before it decides anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

from tunekit.contracts import Batch, Companion, CompanionFacts, PlanContext
from tunekit.data.batching.steps import BatchSettings, StoredSteps, filled_batch, largest_evaluation_batch
from tunekit.data.batching.stream import StreamedSteps
from tunekit.data.rows import RowSet
from tunekit.errors import Problem
from tunekit.model.loaded_model import LoadedModel, as_loaded
from tunekit.planning.forecast import Forecast, largest_batch
from tunekit.planning.initialisation import initialisation_bytes
from tunekit.planning.resources import Resources
from tunekit.planning.simulation import SimulatedRun
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.recipe import Recipe
from tunekit.records import ExecutionSettings

Windows = StoredSteps | StreamedSteps


@dataclass(frozen=True)
class Prepared:
    """The model (without weights), data, adapter and free memory of one rank.

    `loaded`: the recipe as it was read. `recipe`: with this rank's budget, the model section as the objective changes
    it, and token ids in place of the adapter's texts. `context`: the model, the data and the adapter, as companions get
    them. `rows`: with the objective laid out for the base. `batch_settings`, `steps`: with the recipe's micro-batches.
    `written`: the recipe's settings. `problems`: reasons to refuse the recipe that no setting can remove.
    `token_notes`: warnings about the vocabulary, and about tokens that end answers.
    """

    loaded: LoadedRecipe
    recipe: Recipe
    resources: Resources
    context: PlanContext
    rows: RowSet
    companions: Mapping[str, Companion]
    companion_facts: Sequence[CompanionFacts]
    batch_settings: BatchSettings
    packing_reason: str
    steps: Windows
    written: ExecutionSettings
    problems: Sequence[Problem] = ()
    token_notes: Sequence[str] = ()

    @property
    def base(self) -> LoadedModel:
        """The base on the meta device."""
        return as_loaded(self.context.base)

    @cached_property
    def forecast(self) -> Forecast:
        """Predicts the run's memory. It keeps each simulated peak, so that a second plan does not simulate it again."""
        recipe, rows, device = self.recipe, self.rows, self.resources.device
        sections = (recipe.model, recipe.adapter, rows.objective, recipe.training)
        bases = {recipe.model: self.base}
        run = SimulatedRun(*sections, self.written, device, self.companions, bases=bases)
        evaluation, answers = None, 0
        if rows.evaluation is not None and rows.eval_counts is not None:
            size = recipe.evaluation.batch_size
            evaluation = largest_evaluation_batch(rows.evaluation, rows.objective.rows, batch_size=size)
            if recipe.evaluation.generate or recipe.evaluation.samples:
                longest = self.context.virtual_tokens + rows.eval_counts.longest_tokens
                answers = longest + recipe.evaluation.max_new_tokens
        start, facts = initialisation_bytes(recipe.adapter, self.context.targets), self.companion_facts
        companion_bytes, any_token = sum(each.weight_bytes for each in facts), any(each.any_token for each in facts)
        largest = cache(partial(self._largest_batch, run))
        return Forecast(run, self.base, largest, rows.train, evaluation, answers, start, companion_bytes, any_token)

    def _largest_batch(self, run: SimulatedRun, micro_batch_size: int | None) -> Batch:
        """The micro-batch that needs the most memory. `micro_batch_size`: rows per micro-batch; None: limited by
        tokens."""
        steps, settings = self._cut_anew(micro_batch_size)
        train, kind = self.rows.train, self.rows.objective.rows
        if not isinstance(steps, StoredSteps):
            return filled_batch(train, kind, settings)
        largest = largest_batch(steps, train, kind, settings)
        if not self.base.facts.attention.startswith("eager"):
            return largest
        other = largest_batch(steps, train, kind, settings, by_scores=True)
        same = [row.number for row in other.rows] == [row.number for row in largest.rows]
        return other if not same and run.needs_more(other, largest) else largest

    def _cut_anew(self, micro_batch_size: int | None) -> tuple[Windows, BatchSettings]:
        """Divide the rows of each step into micro-batches of a new size. Returns the new steps and settings."""
        settings, written = self.batch_settings, self.batch_settings.micro_batch_size
        if micro_batch_size is None or written is None or micro_batch_size == written:
            return self.steps, settings
        count = max(1, settings.gradient_accumulation_steps * written // micro_batch_size)
        settings = replace(settings, micro_batch_size=micro_batch_size, gradient_accumulation_steps=count)
        return self.rows.steps(settings), settings
