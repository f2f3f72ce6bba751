"""Makes the Plan of a run: all decisions, before weights are loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import tunekit
from tunekit.adapters.base import slot_count
from tunekit.adapters.kernels.joined_lora import describe
from tunekit.adapters.method import load_method
from tunekit.adapters.targets import copied_parameters, trained_count, unreached_experts
from tunekit.contracts import PlanContext
from tunekit.data.batching.steps import BatchSettings
from tunekit.errors import RecipeError, ResourceError
from tunekit.evaluation.evaluator import calibration_notes
from tunekit.model.compute import kernel_packages
from tunekit.model.families.routers import router_notes
from tunekit.planning.checks import execution_checks, learned_length, refusals_of
from tunekit.planning.forecast import supervised_tokens
from tunekit.planning.initialisation import initialisation_notes
from tunekit.planning.kernels import decided_kernels, kernel_notes
from tunekit.planning.memory import choose_execution, search_space, trial_reason
from tunekit.planning.notes import image_notes, position_notes, rank_notes, rate_notes, run_notes
from tunekit.planning.prepared import Prepared, RunSteps
from tunekit.planning.tiers import HEAD_KEY, activation_notes, allowed_tiers, weight_notes
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.recipe import Recipe
from tunekit.records import ExecutionSettings, Plan, PlannedRows
from tunekit.training.schedules import warmup_steps
from tunekit.training.session import Planned


def plan(
    prepared: Prepared,
    fixed: ExecutionSettings | None = None,
    *,
    may_recompute_more: bool = False,
    sharded: bool = False,
) -> tuple[Plan, Planned]:
    """Make the plan of a rank, and the values that training needs. Problems that would make the run fail are in
    `plan.refusals`. Nothing of the run is read, so that a rank can be planned again with the settings of all ranks.

    `fixed`: settings whose `common` values are decided, by all ranks or by the run that is resumed. With
    `may_recompute_more`, it is the resumed run: its main rank uses all its settings again, except the number of
    recomputed layers. `sharded`: another rank shards the base, so that all ranks shard it.
    """
    recipe, written_recipe = prepared.recipe, prepared.loaded.recipe
    if sharded:
        recipe, written_recipe = _sharded(recipe), _sharded(written_recipe)
    kernels, why = decided_kernels(recipe.training.kernels, prepared.kernels, fixed)
    written = replace(prepared.written, kernels=kernels)
    tiers, problems = allowed_tiers(prepared, recipe)
    if any(problem.key == HEAD_KEY for problem in problems):  # a refused head may not even be simulated
        written = replace(written, streamed_head=False)
    resumed = fixed if may_recompute_more and prepared.resources.rank == 0 else None
    space = search_space(prepared, written, tiers, fixed, resumed)
    execution, reasons, shortages = choose_execution(prepared, recipe, space, fixed)
    problems = [*prepared.problems, *execution_checks(prepared, written), *problems]
    refused = [
        *refusals_of(prepared.loaded, problems, RecipeError),
        *refusals_of(prepared.loaded, shortages, ResourceError),
    ]
    of_kernels = kernel_notes(kernels, why, prepared.base.net, prepared.resources.device)
    notes = [*_notes(prepared, written_recipe, execution, reasons), *of_kernels]
    steps, settings = prepared.cut(execution.micro_batch_size, execution.gradient_accumulation_steps)
    draft = _make_plan(prepared, written_recipe, steps, settings, execution)
    base, context = prepared.base, prepared.context
    inputs = prepared.recipe.model, context.processor, prepared.rows, settings, prepared.recipe.adapter
    largest = prepared.forecast.largest_batch(settings.micro_batch_size)
    facts = learned_length(base, context.virtual_tokens), kernel_packages(base.net)
    return replace(draft, refusals=refused, notes=notes), Planned(*inputs, largest, *facts)


def _sharded(recipe: Recipe) -> Recipe:
    """The recipe with memory.sharding: full."""
    return recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"sharding": "full"})})


def _make_plan(
    prepared: Prepared, recipe: Recipe, steps: RunSteps, settings: BatchSettings, execution: ExecutionSettings
) -> Plan:
    """The plan without refusals and notes. `recipe`: the recipe that plan.json contains."""
    facts, rows, trainable = prepared.base.facts, prepared.rows, _trained_numbers(prepared)
    peak, budget = prepared.forecast.known_peak(execution), prepared.recipe.memory.budget_bytes
    trial = trial_reason(prepared.resources.device, peak.total, prepared.resources.free_bytes, budget)
    per_epoch = (steps.micro_batches_per_epoch, steps.steps_per_epoch)
    return Plan(
        tunekit_version=tunekit.__version__,
        recipe=recipe.model_dump(mode="json"),
        model=facts,
        text=prepared.base.text,
        device=str(prepared.resources.device),
        targets=list(prepared.context.targets),
        trainable_parameters=trainable,
        total_parameters=facts.total_parameters + (0 if prepared.recipe.adapter.trains_base else trainable),
        steps=steps.count,
        warmup_steps=warmup_steps(recipe.training, steps.count),
        supervised_tokens=supervised_tokens(steps, rows.train, settings),
        rows=PlannedRows(rows.counts, rows.eval_counts, settings.packing, prepared.packing_reason, *per_epoch),
        choice=execution,
        peak_bytes=peak,
        refusals=[],
        budget_bytes=budget,
        tries_longest_batch=trial[0],
        trial_reason=trial[1],
    )


def _trained_numbers(prepared: Prepared) -> int:
    """Number of trained parameters in adapted layers, in trained modules and in an adapter of the whole model."""
    net, settings, targets = prepared.base.net, prepared.recipe.adapter, prepared.context.targets
    method = load_method(settings.method)
    whole = 0 if method.model is None else slot_count(method.model.slots(settings, net).values())
    return whole + trained_count(method, settings, targets) + copied_parameters(net, method, settings, targets)


def _notes(prepared: Prepared, recipe: Recipe, execution: ExecutionSettings, reasons: Sequence[str]) -> Iterator[str]:
    """The notes of the plan, in the order in which plan.json lists them. `recipe`: the recipe that plan.json contains.
    `reasons`: those of the choice."""
    base, rows, context, device = prepared.base, prepared.rows, prepared.context, prepared.resources.device
    steps, tokens = prepared.steps.count, prepared.forecast.largest_batch(execution.micro_batch_size).padded
    yield from [*prepared.loaded.defaults, *base.notes, *rows.notes, *rows.objective.notes]
    yield from [] if rows.evaluation is None else calibration_notes(recipe.evaluation)
    yield from _adapter_notes(recipe.adapter, context)
    yield from image_notes(recipe, base, rows)
    yield from position_notes(base, rows, context.virtual_tokens)
    yield from run_notes(recipe, base, device)
    yield from rank_notes(recipe, execution)
    yield from initialisation_notes(recipe.adapter, rows.objective, context.targets)
    yield from router_notes(base, recipe.training.router_loss)
    yield from rate_notes(recipe.training, steps)
    yield from prepared.notes
    groups = load_method(recipe.adapter.method).groups(base.net, recipe.adapter, context.targets)
    if groups:
        yield f"some layers are computed together, which saves memory and time: {describe(groups)}"
    yield from reasons
    yield from weight_notes(recipe.memory, base, prepared.resources, execution, tokens)
    for companion in prepared.companions.values():
        yield from companion.notes(context, execution, tokens)
    offloaded = prepared.forecast.offloaded_bytes(execution)
    yield from activation_notes(recipe.memory, device, execution.checkpointed_layers, offloaded)


def _adapter_notes(adapter: AdapterSettings, context: PlanContext) -> Iterator[str]:
    experts = [] if adapter.trains_base else unreached_experts(context.base.net, adapter, context.targets)
    if experts:
        yield f"{len(experts)} fused parameters of experts are not adapted, for example {experts[0]}"
    if context.virtual_tokens:
        yield f"{context.virtual_tokens:,} virtual tokens are put before each row, in addition to data.max_length"
