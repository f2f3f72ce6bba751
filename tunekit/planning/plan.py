"""Makes the Plan from a recipe: all decisions about a run, before weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

import tunekit
from tunekit.adapters.base import slot_count
from tunekit.adapters.kernels.joined_lora import describe
from tunekit.adapters.method import load_method
from tunekit.adapters.targets import copied_parameters, find_targets, trained_count, unreached_experts
from tunekit.companions.base import make_companions
from tunekit.contracts import Batch, Companion, CompanionFacts, PlanContext, Processor
from tunekit.data.batching.stream import StreamedWindows
from tunekit.data.batching.windows import BatchSettings, TrainingWindows, filled_batch, largest_evaluation_batch
from tunekit.data.rows import RowSet, load_rows
from tunekit.errors import Problem, RecipeError
from tunekit.evaluation.evaluator import calibration_notes, check_queries
from tunekit.machine.devices import make_devices
from tunekit.model.attention.documents import keeps_documents_apart, shares_prefixes
from tunekit.model.compute import kernel_packages
from tunekit.model.families import make_family
from tunekit.model.load import LoadedModel, make_meta_model
from tunekit.model.storage.gguf import parsed_once
from tunekit.model.storage.model_folder import copied_files
from tunekit.model.storage.source import find_source
from tunekit.objectives.base import make_objective
from tunekit.objectives.losses.logprobs import LEAST_CHUNK_TOKENS
from tunekit.planning import refusals
from tunekit.planning.cheaper import cheapest_changes
from tunekit.planning.choice import written_choice
from tunekit.planning.ends import end_notes
from tunekit.planning.findings import Findings
from tunekit.planning.forecast import Forecast, largest_batch, supervised_tokens
from tunekit.planning.kernels import kernel_notes, kernel_problems
from tunekit.planning.memory import PlannedMemory, plan_memory
from tunekit.planning.simulation import SimulatedRun
from tunekit.planning.starts import check_continued, reference_problems, start_bytes, start_notes, start_problems
from tunekit.planning.tiers import activation_notes, allowed_tiers, weight_notes
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.recipe.recipe import Recipe
from tunekit.records import Choice, Plan, PlannedRows, Target
from tunekit.targets.labels import start_facts
from tunekit.training.schedules import warmup_steps
from tunekit.training.state import Processors, RunInputs
from tunekit.tuned.fit import check_family, row_problems

END_TO_END = (
    "; the rows of a micro-batch are put end to end without padding (a test before step 1 checks that they do not see "
    "each other; otherwise they are padded)"
)
Windows = TrainingWindows | StreamedWindows


@dataclass(frozen=True)
class Inputs:
    """The model (without weights), data and adapter of the recipe."""

    model: ModelSection  # the recipe's section, changed by the objective
    base: LoadedModel
    processor: Processor
    rows: RowSet
    targets: list[Target]
    adapter: AdapterSettings  # with token ids in place of its texts
    companions: dict[str, Companion]
    companion_facts: list[CompanionFacts]

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens that the adapter puts before each row."""
        model = load_method(self.adapter.method).model
        return 0 if model is None else model.virtual_tokens(self.adapter)


def make_plan(
    loaded: LoadedRecipe,
    *,
    device: torch.device | None = None,
    check_folder: bool = False,
    previous: Choice | None = None,
    ranks: int = 1,
    rank: int = 0,
    shared: Choice | None = None,
    processors: Processors | None = None,
) -> tuple[Plan, RunInputs]:
    """Make the plan of a run, and the inputs that training needs. Problems that would make the run fail are in
    `plan.refusals`.

    `check_folder`: also check output.dir; not for `train`, which has already locked it.
    `previous`: the settings of the resumed run; only the number of recomputed layers may change. `ranks`: the number
    of processes; `rank`: the process that is planned. `shared`: a Choice with the settings of all ranks.
    `processors`: the loaded processors, which other plans of this process use too.
    Raises: TunekitError with all problems, if model, data or adapted layers cannot be read at all.
    """
    recipe, device = loaded.recipe, device or make_devices().device
    recipe = recipe.model_copy(update={"memory": recipe.memory.of_rank(rank, ranks)})
    findings = Findings(loaded)
    findings.add(refuse_unsupported(recipe))
    findings.add(refusals.library_problems(recipe))
    findings.add(refusals.device_problems(recipe, device))
    if check_folder:
        findings.add(refusals.folder_problems(recipe))
    if previous is None:  # a run of an older version can be resumed
        findings.add(refusals.step_problems(recipe))
    inputs = _read_inputs(recipe, device, findings, {} if processors is None else processors)
    if inputs is None:
        raise findings.error()
    recipe = recipe.model_copy(update={"adapter": inputs.adapter, "model": inputs.model})
    findings.add(refusals.template_problems(recipe, inputs.processor, inputs.rows.template))
    packing, reason = _packing(recipe, inputs, findings)
    settings = _batch_settings(recipe, inputs, packing)
    shares = settings.end_to_end and shares_prefixes(inputs.base.net, recipe.data.max_length)
    objective = inputs.rows.objective.laid_out(settings.end_to_end, shares)
    inputs = replace(inputs, rows=replace(inputs.rows, objective=objective))
    reason += END_TO_END if settings.end_to_end else ""
    windows = findings.attempt(partial(inputs.rows.windows, settings))
    if windows is None:
        raise findings.error()
    rows = inputs.rows
    findings.add(row_problems(inputs.base, inputs.processor, objective.rows, rows.all, inputs.virtual_tokens))
    findings.add(start_problems(recipe.adapter, inputs.base, inputs.targets))
    findings.add(reference_problems(recipe.adapter, objective))
    if previous is None:  # the state of a resumed run is in its checkpoint
        findings.attempt(partial(check_continued, recipe.adapter, inputs.base, inputs.targets))
    findings.add([problem for facts in inputs.companion_facts for problem in facts.problems])
    decided = previous or shared
    choice = written_choice(recipe, inputs.base, device, ranks, decided)
    findings.add(_run_problems(recipe, windows.steps, device, choice))
    forecast = _forecast(recipe, inputs, windows, settings, device, choice)
    rules = partial(allowed_tiers, base=inputs.base, device=device, companions=inputs.companion_facts, ranks=ranks)
    tiers, problems = rules(recipe)
    findings.add(problems)
    cheaper = partial(cheapest_changes, recipe, forecast, lambda changed: len(rules(changed)[1]) > len(problems))
    resumed = None if rank else previous
    memory = plan_memory(forecast, tiers, resumed, findings, cheaper, shared=decided)
    if as_chosen(settings, memory.choice) != settings:
        settings = as_chosen(settings, memory.choice)
        windows = rows.windows(settings)
    plan = _assemble(loaded, device, inputs, windows, settings, (packing, reason), memory, findings)
    plan.notes.extend(kernel_notes(recipe.training.kernels, inputs.base.net, device, inputs.base.dtype, decided))
    largest = forecast.largest_batch(settings.micro_batch_size)
    facts = refusals.learned_length(inputs.base, inputs.virtual_tokens), kernel_packages(inputs.base.net)
    return plan, RunInputs(inputs.model, inputs.processor, rows, settings, inputs.adapter, largest, *facts)


def as_chosen(settings: BatchSettings, choice: Choice) -> BatchSettings:
    """The batch settings, with the size and number of micro-batches in the Choice. Each step keeps its rows and their
    order."""
    rows, steps = choice.micro_batch_size, choice.gradient_accumulation_steps
    return replace(settings, micro_batch_size=rows, gradient_accumulation_steps=steps)


def _read_inputs(recipe: Recipe, device: torch.device, findings: Findings, processors: Processors) -> Inputs | None:
    """Read model, data and adapter. None if one of them cannot be read. All problems are added to `findings`."""
    family, seed, model = recipe.objective.family, recipe.training.seed, recipe.model
    rows = targets = adapter = base = None
    with parsed_once(model.name_or_path):
        processor = processors.get((family, model)) or findings.attempt(partial(make_family(family).processor, model))
        facts = findings.attempt(lambda: start_facts(recipe))
        objective = None
        if processor is not None:
            processors[family, model] = processor
            objective = findings.attempt(partial(make_objective, recipe.objective, processor, facts))
        if objective is not None:
            rows = findings.attempt(partial(load_rows, recipe.data, objective, seed=seed))
            model = (objective if rows is None else rows.objective).section(model, seed)
        if rows is not None:
            findings.attempt(partial(check_queries, rows, recipe.evaluation, recipe.data))
        if processor is not None or make_family(family).reads_ids:  # else the error is reported already
            base = findings.attempt(lambda: check_family(make_meta_model(model, device=device), family))
    if processor is not None:
        text, with_tokenizer = processor.tokenizer, load_method(recipe.adapter.method).with_tokenizer
        adapter = findings.attempt(lambda: recipe.adapter if text is None else with_tokenizer(recipe.adapter, text))
    if base is not None and recipe.adapter.trains_base:
        findings.attempt(lambda: copied_files(model, find_source(model, weights=False).folder))
    if base is not None and adapter is not None:
        trained_whole = list(dict.fromkeys([*base.new_modules, *base.family.trained_with(base.net)]))
        adapter = findings.attempt(partial(with_saved_modules, adapter, trained_whole))
    if base is not None:
        head = base.family.head_name(base.net)
        targets = findings.attempt(lambda: find_targets(base.net, adapter or recipe.adapter, head_name=head))
        if adapter is not None and not _fits_the_model(adapter, base, findings):
            return None
    if base is None or processor is None or rows is None or targets is None or adapter is None:
        return None
    inputs = Inputs(model, base, processor, rows, targets, adapter, make_companions(rows.objective.companions), [])
    planned = _planned(recipe, inputs, device)
    for companion in inputs.companions.values():
        known = findings.attempt(partial(companion.facts, planned))
        if known is None or not known.usable:
            findings.add([] if known is None else known.problems)
            return None
        inputs.companion_facts.append(known)
    return inputs


def _planned(recipe: Recipe, inputs: Inputs, device: torch.device) -> PlanContext:
    """The facts about the run that companions (auxiliary models) need for the plan."""
    rows, sections = inputs.rows, (recipe.memory, recipe.training, recipe.evaluation)
    data = (inputs.processor, rows.objective, rows.all, bool(rows.streams))
    return PlanContext(device, inputs.base, *data, *sections, inputs.targets, inputs.virtual_tokens)


def with_saved_modules(adapter: AdapterSettings, names: Sequence[str]) -> AdapterSettings:
    """The adapter's settings, with these modules added to modules_to_save.

    Raises: RecipeError if the adapter's method cannot train other modules.
    """
    saved = getattr(adapter, "modules_to_save", None)
    if saved is None and names:
        what = (
            f"{adapter.method} cannot train modules outside the adapter, but this objective trains the head "
            f"'{names[-1]}'"
        )
        raise RecipeError(what, "choose another method, for example lora", key="adapter.method")
    missing = [name for name in names if name not in (saved or ())]
    return (
        adapter.model_copy(update={"modules_to_save": (*saved, *missing)}) if saved is not None and missing else adapter
    )


def _fits_the_model(adapter: AdapterSettings, base: LoadedModel, findings: Findings) -> bool:
    """Whether the adapter fits the model. If not, the problem is added to `findings`."""
    model_method = load_method(adapter.method).model
    if model_method is not None and not adapter.trains_base and not base.family.reads_ids:
        what = (
            f"{adapter.method} adds vectors to the embeddings of token ids, but {base.family.text} reads no token ids"
        )
        findings.add([Problem(what, "choose a method that adapts layers, for example lora", key="adapter.method")])
        return False
    return model_method is None or findings.attempt(lambda: model_method.slots(adapter, base.net)) is not None


def _packing(recipe: Recipe, inputs: Inputs, findings: Findings) -> tuple[bool, str]:
    """Whether rows are packed, and the reason as text."""
    if not recipe.data.packing:
        return False, "each step has as many rows as the recipe says"
    obstacle = refusals.packing_obstacle(inputs.base, inputs.rows.objective.rows, inputs.virtual_tokens > 0)
    if obstacle is not None:
        findings.add([Problem(obstacle, "write packing: false", key="data.packing")])
    return obstacle is None, obstacle or "as the recipe says"


def _batch_settings(recipe: Recipe, inputs: Inputs, packing: bool) -> BatchSettings:
    """The batch settings of the run. Rows that are not packed are put end to end without padding, if the model allows
    it."""
    apart = inputs.rows.objective.rows.packable and not inputs.virtual_tokens and keeps_documents_apart(inputs.base.net)
    training, data = recipe.training, recipe.data
    return BatchSettings(
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_length=data.max_length,
        packing=packing,
        shuffle=data.shuffle,
        seed=training.seed,
        epochs=training.epochs,
        max_steps=training.max_steps,
        updates_per_sampling=inputs.rows.objective.loss.updates_per_sampling,
        end_to_end=apart and not packing,
        rank_speeds=training.rank_speeds or (),
    )


def _run_problems(recipe: Recipe, steps: int, device: torch.device, choice: Choice) -> list[Problem]:
    """Problems of settings that do not suit a run with this number of steps."""
    method = load_method(recipe.adapter.method)
    found = method.run_conflicts(recipe.adapter, steps)
    problems = [Problem(conflict.what, conflict.how, key=f"adapter.{conflict.key}") for conflict in found]
    return [*problems, *kernel_problems(choice.kernels, device)]


def _forecast(
    recipe: Recipe, inputs: Inputs, windows: Windows, settings: BatchSettings, device: torch.device, choice: Choice
) -> Forecast:
    rows = inputs.rows
    sections = (recipe.model, recipe.adapter, rows.objective, recipe.training)
    bases = {recipe.model: inputs.base}
    run = SimulatedRun(*sections, choice, device, recipe.memory, inputs.companions, bases=bases)
    evaluation, answers = None, 0
    if rows.evaluation is not None and rows.eval_counts is not None:
        size = recipe.evaluation.batch_size
        evaluation = largest_evaluation_batch(rows.evaluation, rows.objective.rows, batch_size=size)
        if recipe.evaluation.generate or recipe.evaluation.samples:
            answers = inputs.virtual_tokens + rows.eval_counts.longest_tokens + recipe.evaluation.max_new_tokens
    start, facts = start_bytes(recipe.adapter, inputs.targets), inputs.companion_facts
    companion_bytes, any_token = sum(each.weight_bytes for each in facts), any(each.any_token for each in facts)
    largest = cache(partial(_largest_batch, inputs, windows, settings, run))
    return Forecast(run, inputs.base, largest, rows.train, evaluation, answers, start, companion_bytes, any_token)


def _largest_batch(
    inputs: Inputs, windows: Windows, settings: BatchSettings, run: SimulatedRun, micro_batch_size: int | None
) -> Batch:
    """The micro-batch that needs the most memory. `micro_batch_size`: rows per micro-batch; None: limited by tokens."""
    rows = inputs.rows
    windows, settings = _cut_anew(inputs, windows, settings, micro_batch_size)
    if not isinstance(windows, TrainingWindows):
        return filled_batch(rows.train, rows.objective.rows, settings)
    largest = largest_batch(windows, rows.train, rows.objective.rows, settings)
    if not inputs.base.facts.attention.startswith("eager"):
        return largest
    other = largest_batch(windows, rows.train, rows.objective.rows, settings, by_scores=True)
    same = [row.number for row in other.rows] == [row.number for row in largest.rows]
    return other if not same and run.needs_more(other, largest) else largest


def _cut_anew(
    inputs: Inputs, windows: Windows, settings: BatchSettings, micro_batch_size: int | None
) -> tuple[Windows, BatchSettings]:
    """Divide the rows of each step into micro-batches of a new size. Returns the new windows (steps) and settings."""
    written = settings.micro_batch_size
    if micro_batch_size is None or written is None or micro_batch_size == written:
        return windows, settings
    steps = max(1, settings.gradient_accumulation_steps * written // micro_batch_size)
    settings = as_chosen(settings, Choice(micro_batch_size, steps, LEAST_CHUNK_TOKENS))
    return inputs.rows.windows(settings), settings


def _assemble(
    loaded: LoadedRecipe,
    device: torch.device,
    inputs: Inputs,
    windows: Windows,
    settings: BatchSettings,
    packing: tuple[bool, str],
    memory: PlannedMemory,
    findings: Findings,
) -> Plan:
    recipe, facts, rows = loaded.recipe, inputs.base.facts, inputs.rows
    trainable, per_epoch = _trained_numbers(inputs), (windows.micro_batches_per_epoch, windows.steps_per_epoch)
    return Plan(
        tunekit_version=tunekit.__version__,
        recipe=recipe.model_dump(mode="json"),
        model=facts,
        text=inputs.base.text,
        device=str(device),
        targets=inputs.targets,
        trainable_parameters=trainable,
        total_parameters=facts.total_parameters + (0 if inputs.adapter.trains_base else trainable),
        steps=windows.steps,
        warmup_steps=warmup_steps(recipe.training, windows.steps),
        supervised_tokens=supervised_tokens(windows, rows.train, settings),
        rows=PlannedRows(rows.counts, rows.eval_counts, *packing, *per_epoch),
        choice=memory.choice,
        peak_bytes=memory.peak,
        refusals=findings.refusals(),
        notes=[*loaded.defaults, *_notes(recipe, device, inputs, memory, windows.steps)],
        budget_bytes=memory.budget_bytes,
        tries_longest_batch=memory.tries_longest,
        trial_reason=memory.trial_reason,
    )


def _trained_numbers(inputs: Inputs) -> int:
    """Number of trained parameters in adapted layers, in trained modules and in an adapter of the whole model."""
    net, settings, targets = inputs.base.net, inputs.adapter, inputs.targets
    method = load_method(settings.method)
    whole = 0 if method.model is None else slot_count(method.model.slots(settings, net).values())
    return whole + trained_count(method, settings, targets) + copied_parameters(net, method, settings, targets)


def _notes(recipe: Recipe, device: torch.device, inputs: Inputs, memory: PlannedMemory, steps: int) -> list[str]:
    net, adapter, choice = inputs.base.net, recipe.adapter, memory.choice
    experts = [] if adapter.trains_base else unreached_experts(net, adapter, inputs.targets)
    notes = [*inputs.base.notes, *inputs.rows.notes, *inputs.rows.objective.notes]
    notes += [] if inputs.rows.evaluation is None else calibration_notes(recipe.evaluation)
    if experts:
        notes.append(f"{len(experts)} fused parameters of experts are not adapted, for example {experts[0]}")
    if inputs.virtual_tokens:
        notes.append(
            f"{inputs.virtual_tokens:,} virtual tokens are put before each row, in addition to data.max_length"
        )
    notes += refusals.position_notes(inputs.base, inputs.rows, inputs.virtual_tokens)
    notes += [*refusals.run_notes(recipe, inputs.base, device), *refusals.rank_notes(recipe, choice)]
    notes += start_notes(recipe.adapter, inputs.rows.objective, inputs.targets)
    notes += refusals.rate_notes(recipe.training, steps)
    notes += end_notes(inputs.model, inputs.base, inputs.processor.tokenizer, inputs.rows, adapter, inputs.targets)
    groups = load_method(adapter.method).groups(net, adapter, inputs.targets)
    if groups:
        notes.append(f"some layers are computed together, which saves memory and time: {describe(groups)}")
    notes += [*memory.reasons, *weight_notes(recipe.memory, inputs.base, device, choice, memory.largest_tokens)]
    step_tokens, planned = choice.gradient_accumulation_steps * memory.largest_tokens, _planned(recipe, inputs, device)
    for companion in inputs.companions.values():
        companion.sampling_batch_size = choice.sampling_batch_size
        notes += companion.notes(planned, step_tokens)
    return [*notes, *activation_notes(recipe.memory, device, choice.checkpointed_layers, memory.offloaded_bytes)]
