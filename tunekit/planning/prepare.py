"""Reads all that planning needs: the model without its weights, the data, the adapter and the free memory."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from tunekit.adapters.method import load_method
from tunekit.adapters.targets import find_targets
from tunekit.companions.base import make_companions
from tunekit.contracts import Objective, PlanContext, Processor, RowKind
from tunekit.data.batching.steps import BatchSettings
from tunekit.data.encoding.sources import encode_options
from tunekit.data.rows import RowSet, load_rows
from tunekit.errors import Problem, RecipeError
from tunekit.evaluation.evaluator import check_queries
from tunekit.machine.drivers import gpu_problem
from tunekit.model.attention.documents import keeps_documents_apart, shares_prefixes
from tunekit.model.families import make_family
from tunekit.model.load import LoadedModel, make_meta_model
from tunekit.model.loaded_model import as_loaded
from tunekit.model.storage.gguf import parsed_once
from tunekit.model.storage.model_folder import check_copied_files, check_processor_files
from tunekit.model.storage.source import find_source, is_here
from tunekit.objectives.base import make_objective
from tunekit.planning.checks import Findings, packing_obstacle, recipe_checks, run_checks, template_problems
from tunekit.planning.execution import written_execution
from tunekit.planning.forecast import read_stored_base
from tunekit.planning.kernels import planned_kernels
from tunekit.planning.notes import end_notes, time_notes
from tunekit.planning.prepared import Prepared, read_resources
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.recipe.recipe import Recipe
from tunekit.targets.labels import start_facts
from tunekit.training.state import Processors
from tunekit.tuned.fit import check_family

LEAST_VOCABULARY = 0.5  # share of the base's tokens that its tokenizer has at least
END_TO_END = (
    "; the rows of a micro-batch are put end to end without padding (a test before step 1 checks that they do not see "
    "each other; otherwise they are padded)"
)


def prepare(
    loaded: LoadedRecipe,
    device: torch.device,
    *,
    rank: int = 0,
    ranks: int = 1,
    resumed: Literal["run", "sweep"] | None = None,
    check_folder: bool = False,
    processors: Processors | None = None,
) -> Prepared:
    """Read model, data, adapter and free memory for one rank of a run on `ranks` ranks, and check them.

    `resumed`: the run continues from a checkpoint, or it begins in a sweep that continues; an older version, which did
    not refuse the recipe, may have started either. `check_folder`: also check output.dir; not for `train`, which has
    already locked it. `processors`: the loaded processors, which other plans of this process use too.
    Raises: TunekitError with all problems, if model, data or adapted layers cannot be read at all.
    """
    recipe = loaded.recipe.model_copy(update={"memory": loaded.recipe.memory.of_rank(rank, ranks)})
    findings = Findings(loaded)
    findings.add(recipe_checks(recipe, device, check_folder=check_folder, resumed=resumed is not None))
    recipe, context, rows = _read(recipe, device, findings, {} if processors is None else processors)
    companions = make_companions(rows.objective.companions)
    examined = [findings.attempt(companion.examine, context) for companion in companions.values()]
    companion_problems = [problem for problems in examined for problem in problems or ()]
    if None in examined:
        raise findings.error()
    findings.add(template_problems(recipe, context.processor, rows.template))
    packing, reason = _packing(recipe, context, rows.objective.rows, findings)
    settings = _batch_settings(recipe, context, rows.objective, packing)
    shares = settings.end_to_end and shares_prefixes(context.base.net, recipe.data.max_length)
    rows = replace(rows, objective=rows.objective.laid_out(settings.end_to_end, shares))
    steps = findings.attempt(rows.steps, settings)
    if steps is None:
        raise findings.error()
    reason += END_TO_END if settings.end_to_end else ""
    base, resources = as_loaded(context.base), read_resources(device, rank, ranks)
    kernels = planned_kernels(recipe.training.kernels, base.net, device, base.dtype)
    prepared = Prepared(
        loaded=loaded,
        recipe=recipe,
        resources=resources,
        context=context,
        stored=read_stored_base(recipe.model, base),
        rows=rows,
        companions=companions,
        batch_settings=settings,
        packing_reason=reason,
        steps=steps,
        kernels=kernels,
        written=written_execution(recipe, kernels[0], ranks),
    )
    findings.add([*run_checks(prepared, resumed=resumed == "run"), *companion_problems])
    problem = gpu_problem() if device.type == "cpu" else None
    notes = [] if problem is None else [f"warning: this run uses the CPU: {problem}"]
    notes += [*time_notes(recipe, steps.count), *_vocabulary_notes(context), *end_notes(prepared)]
    if left_out := getattr(steps, "left_out", 0):
        notes.append(f"{left_out:,} rows of an epoch fit into no step, because their texts occur in too many rows")
    return replace(prepared, problems=tuple(findings.problems), notes=tuple(notes))


def _read(
    recipe: Recipe, device: torch.device, findings: Findings, processors: Processors
) -> tuple[Recipe, PlanContext, RowSet]:
    """Read model, data and adapter. Returns the recipe too, with the model section as the objective changes it, and
    with token ids in place of the adapter's texts. Raises: TunekitError with all problems, if one cannot be read."""
    attempt, model, seed = findings.attempt, recipe.model, recipe.training.seed
    key = recipe.objective.family, model
    family = make_family(recipe.objective.family)
    with parsed_once(model.name_or_path):
        processor = processors.get(key) or attempt(family.processor, model)
        labels = attempt(start_facts, recipe) or {}
        objective = attempt(make_objective, recipe.objective, processor, labels)
        first = model if objective is None else _with_some_labels(objective.section(model, seed))
        readable = processor is not None or family.reads_ids  # else the error is reported already
        meta = attempt(make_meta_model, first, device=device) if readable else None
        base = attempt(check_family, meta, recipe.objective.family)
        if base is not None:
            attempt(lambda: check_processor_files(model, find_source(model, weights=False).folder))
        if findings.errors:  # before any row is encoded, which may take long
            raise findings.error()
        rows = attempt(load_rows, recipe.data, objective, seed=seed)
        attempt(check_queries, rows, recipe.evaluation, recipe.data)
        model = model if objective is None or rows is None else rows.objective.section(model, seed)
        if rows is not None and model != first:  # the rows have the labels of its head
            base = attempt(make_meta_model, model, device=device)
    adapter = attempt(_with_token_ids, recipe.adapter, processor)
    if recipe.adapter.trains_base and base is not None:  # it copies files of the base from its folder
        attempt(lambda: check_copied_files(model, find_source(model, weights=False).folder))
    adapter = attempt(_with_whole_modules, adapter, base)
    head_name = None if base is None else base.family.head_name(base.net)
    net = None if base is None else base.net
    targets = attempt(find_targets, net, adapter or recipe.adapter, head_name=head_name)
    method = load_method(recipe.adapter.method).model
    slots = attempt(_check_fit, adapter, base)
    if processor is None or rows is None or base is None or adapter is None or targets is None or slots is None:
        raise findings.error()
    processors[key] = processor
    virtual_tokens = 0 if method is None else method.virtual_tokens(adapter)
    sections = (recipe.memory, recipe.training, recipe.evaluation)
    context = PlanContext(device, base, processor, rows.all, bool(rows.streams), *sections, targets, virtual_tokens)
    return recipe.model_copy(update={"adapter": adapter, "model": model}), context, rows


def _with_some_labels(section: ModelSection) -> ModelSection:
    """The section, with two labels if only the rows have the labels of its head."""
    unknown = isinstance(section, HeadedModel) and not section.labels
    return section.model_copy(update={"labels": ("0", "1")}) if unknown else section


def _vocabulary_notes(context: PlanContext) -> Iterator[str]:
    """A warning if the tokenizer has far fewer tokens than the base."""
    tokenizer, text = context.processor.tokenizer, as_loaded(context.base).text
    if tokenizer is None or text is None or tokenizer.vocabulary_size >= text.vocabulary_size * LEAST_VOCABULARY:
        return
    count = f"the tokenizer has {tokenizer.vocabulary_size:,} tokens, but the base has {text.vocabulary_size:,}"
    yield f"warning: {count}; check that the tokenizer's files belong to this base"


def _with_token_ids(adapter: AdapterSettings, processor: Processor) -> AdapterSettings:
    text = processor.tokenizer
    return adapter if text is None else load_method(adapter.method).with_tokenizer(adapter, text)


def _with_whole_modules(adapter: AdapterSettings, base: LoadedModel) -> AdapterSettings:
    """The adapter's settings, with the modules that the objective trains whole added to modules_to_save.

    Raises: RecipeError if the adapter's method cannot train other modules.
    """
    names = base.head_modules
    saved = getattr(adapter, "modules_to_save", None)
    if saved is None and names:
        what = (
            f"{adapter.method} cannot train modules outside the adapter, but this objective trains the head "
            f"'{names[-1]}'"
        )
        raise RecipeError(what, "choose another method, for example lora", key="adapter.method")
    missing = [name for name in names if name not in (saved or ())]
    return adapter.model_copy(update={"modules_to_save": (*(saved or ()), *missing)}) if missing else adapter


def _check_fit(adapter: AdapterSettings, base: LoadedModel) -> bool:
    """Raises: TunekitError if an adapter of the whole model does not fit the base."""
    method = load_method(adapter.method).model
    if method is not None and not adapter.trains_base and not base.family.reads_ids:
        what = (
            f"{adapter.method} adds vectors to the embeddings of token ids, but {base.family.text} reads no token ids"
        )
        raise RecipeError(what, "choose a method that adapts layers, for example lora", key="adapter.method")
    if method is not None:
        method.slots(adapter, base.net)
    return True


def _packing(recipe: Recipe, context: PlanContext, kind: RowKind, findings: Findings) -> tuple[bool, str]:
    """Whether rows are packed, and the reason as text."""
    if not recipe.data.packing:
        return False, "each step has as many rows as the recipe says"
    obstacle = packing_obstacle(as_loaded(context.base), kind, context.virtual_tokens > 0)
    if obstacle is not None:
        findings.add([Problem(obstacle, "write packing: false", key="data.packing")])
    return obstacle is None, obstacle or "as the recipe says"


def _batch_settings(recipe: Recipe, context: PlanContext, objective: Objective, packing: bool) -> BatchSettings:
    """The batch settings of the run. Rows that are not packed are put end to end without padding, if the model allows
    it."""
    training, data = recipe.training, recipe.data
    apart = objective.rows.packable and not context.virtual_tokens and keeps_documents_apart(context.base.net)
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
        updates_per_sampling=objective.loss.updates_per_sampling,
        end_to_end=apart and not packing,
        rank_speeds=training.rank_speeds or (),
    )


def row_kind_at_hand(recipe: Recipe) -> RowKind | None:
    """The row kind of the recipe's objective, with its tokenizer or processor and its chat template.

    None if the tokenizer is not downloaded yet.
    Raises: TunekitError if these files cannot be read, or if options of the recipe do not apply to these rows.
    """
    if not is_here(recipe.model):
        return None
    processor = make_family(recipe.objective.family).processor(recipe.model)
    objective = make_objective(recipe.objective, processor, start_facts(recipe), encode_options(recipe.data))
    problems = objective.rows.problems()
    if problems:
        raise RecipeError.of(problems)
    return objective.rows
