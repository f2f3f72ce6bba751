"""TARGET of eval, generate and merge: resolves a path, hub id or recipe, and loads its model with the adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tunekit.adapters.folder.config import TEMPLATE_NAME, AdapterConfig, read_adapter_config
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.artifacts.checkpoint import find_checkpoint
from tunekit.artifacts.stopped import named_state
from tunekit.contracts import Objective, Processor
from tunekit.data.encoding.sources import read_template
from tunekit.data.rows import load_rows
from tunekit.errors import InputError, ModelError
from tunekit.files.work_folder import temporary_folder
from tunekit.model.families import make_family
from tunekit.model.load import LoadedModel, load_model
from tunekit.model.storage.gguf import parsed_once
from tunekit.model.storage.inspection import family_of_base
from tunekit.model.storage.source import PIPELINE_INDEX, find_source
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.bases.paths import cannot_be_hub_name
from tunekit.recipe.data import DataSection
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.load import TargetOverrides, load_recipe, load_target_overrides
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import known_names, objective_class
from tunekit.recipe.recipe import Recipe, make_objective_settings, supervised_objective
from tunekit.records import ExecutionSettings
from tunekit.targets.class_names import with_class_names
from tunekit.targets.export import NAME_BASE, export_checkpoint, load_run_recipe
from tunekit.targets.labels import adapter_family, head_facts, named_labels, start_facts, stated_objective
from tunekit.tuned.fit import check_family
from tunekit.tuned.model import TunedModel
from tunekit.tuned.network import prepare_network


@dataclass(frozen=True)
class TargetSpec:
    """A resolved TARGET. `adapter`: its folder, or None for a bare model; `recipe`: the recipe of the target or of
    its run, if any."""

    kind: str  # adapter, run, checkpoint, model, recipe
    model: ModelSection
    evaluation: EvaluationSection
    adapter: Path | None = None
    recipe: Recipe | None = None
    run: Path | None = None  # the run's folder
    notes: tuple[str, ...] = ()  # to be printed: other tools' spellings, and the step of a stopped run
    labels: tuple[str, ...] = ()  # the user's names for the rows of a head that another tool trained
    problem_type: str | None = None  # the meaning of the scores of a head whose files do not state it
    holder: TemporaryDirectory[str] | None = None  # keeps the temporary folder of a checkpoint's adapter alive

    @property
    def template_file(self) -> Path | None:
        """A chat template that replaces the tokenizer's own: the template in the adapter's folder, otherwise the
        recipe's template."""
        exported = None if self.adapter is None else self.adapter / TEMPLATE_NAME
        configured = None if self.recipe is None else self.recipe.data.chat_template
        if exported is not None and exported.exists():
            return exported
        return None if configured is None else Path(configured)

    @property
    def data(self) -> DataSection | None:
        """The data section of the run or recipe, with the adapter's template."""
        if self.recipe is None:
            return None
        template = None if self.template_file is None else str(self.template_file)
        return self.recipe.data.model_copy(update={"chat_template": template})

    @property
    def chat_template(self) -> str | None:
        """The text of the template file.

        Raises: RecipeError if it cannot be read.
        """
        return None if self.template_file is None else read_template(self.template_file)

    @property
    def seed(self) -> int:
        """The seed that splits off the evaluation rows and initialises a new head."""
        return 0 if self.recipe is None else self.recipe.training.seed

    @property
    def choice(self) -> ExecutionSettings:
        """The recipe's memory settings that also apply without training."""
        if self.recipe is None:
            return ExecutionSettings()
        memory = self.recipe.memory
        tier = memory.streaming if memory.streaming in ("host", "disk") else "off"
        tiles = memory.mlp_tile_tokens
        return ExecutionSettings(streaming=tier, streamed_head=memory.streamed_head, mlp_tile_tokens=tiles)


@dataclass(frozen=True)
class LoadedTarget:
    """A target with its model, its processor and its objective."""

    target: TargetSpec
    model: TunedModel
    processor: Processor
    objective: Objective  # the one it was trained for, or the default one of its family

    @property
    def tokenizer(self) -> LoadedTokenizer:
        """The tokenizer. Raises: InputError for a model without text."""
        if not isinstance(self.processor.tokenizer, LoadedTokenizer):
            what = f"the model is {self.model.base.family.text}, which neither reads nor writes text"
            raise InputError(what, "name another target")
        return self.processor.tokenizer


def find_target(target: str, base: str | None, overrides: Sequence[str], *, allow_code: bool = False) -> TargetSpec:
    """Resolve TARGET from its files; nothing is loaded. `allow_code`: the code of a run's base may run without
    model.trust_remote_code=true among the overrides.

    Raises: InputError if TARGET cannot be resolved, or if an adapter's base cannot be found; AdapterError if an
    adapter's file is damaged. (This is checked first, because the base takes long to load.)
    """
    parsed = load_target_overrides(overrides)
    parsed.model.update(base_override(base))
    path, rewrites = Path(target).expanduser(), parsed.rewrites
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        loaded = load_recipe(path)
        rewrites = [*loaded.rewrites, *rewrites]
        spec = _from_recipe("recipe", loaded.recipe, None, parsed)
    elif (checkpoint := find_checkpoint(target)) is not None:
        spec = _from_checkpoint(checkpoint, parsed, allow_code=allow_code)
    elif path.is_dir():
        spec = _from_folder(path.resolve(), target, parsed, allow_code=allow_code)
    elif path.exists() and path.suffix.lower() != ".gguf":
        what = f"{target} is a file that is neither a recipe (.yaml) nor a model (.gguf)"
        raise InputError(what, "name a run, an adapter or a model by its folder")
    elif path.exists():
        spec = _bare_model(str(path.resolve()), parsed)
    else:
        spec = _bare_model(target, parsed)
        _require_model(target, spec.model)
    if parsed.labels and spec.labels != parsed.labels:
        what = f"objective.labels is only for an adapter that does not name its head's labels; {target} names them"
        raise InputError(what, "remove it")
    if parsed.problem_type != spec.problem_type:
        what = (
            f"objective.problem_type is only for a head whose files do not state its problem type; {target} states it"
        )
        raise InputError(what, "remove it")
    if spec.adapter is not None:
        read_adapter_config(spec.adapter).check_files()
        renamed, holder, notes = with_class_names(spec.model, spec.adapter, spec.holder)
        spec, rewrites = replace(spec, adapter=renamed, holder=holder), [*rewrites, *notes]
    return replace(spec, notes=(*rewrites, *spec.notes))


def base_override(base: str | None) -> dict[str, str]:
    """The override of the model section for --base. Raises: InputError if it is the path of nothing."""
    if base is None:
        return {}
    path = Path(base).expanduser()
    if path.exists():
        return {"name_or_path": str(path.resolve())}
    if cannot_be_hub_name(base):
        raise InputError(f"there is no folder or file {base}", "check the path", key="--base")
    return {"name_or_path": base}


def measuring_objective(base: LoadedModel, processor: Processor, problem_type: str | None = None) -> Objective:
    """The objective that measures the loss if no recipe names an objective. `problem_type`: the meaning of a head's
    scores, if the model's files do not state it. Raises: ModelError if there is no such objective."""
    facts = {**base.family.facts(base.net), **_stated(problem_type)}
    settings = supervised_objective(base.family.objectives, _scores(facts)) or make_objective_settings({})
    check_family(base, settings.family)
    return make_objective(settings, processor, facts)


def _stated(problem_type: str | None) -> dict[str, str]:
    return {} if problem_type is None else {"problem_type": problem_type}


def _scores(facts: Mapping[str, Any]) -> int:
    """The number of rows of a head if its files do not state the problem type; otherwise 0."""
    return 0 if "problem_type" in facts else len(facts.get("labels", ()))


def _require_model(target: str, section: ModelSection) -> None:
    """Refuse an unknown name.

    Raises: InputError if it is neither on this machine nor a model of the hub.
    """
    try:
        find_source(section, weights=False)
    except ModelError as error:
        what = f"{target} is neither a folder, a recipe (.yaml) or a .gguf file here, nor a model of the hub"
        how = "check the path; TARGET is a run, an adapter or a model folder, a recipe, a .gguf file or a hub name"
        raise InputError(f"{what}: {error.problems[0].what}", how) from error


def _from_folder(folder: Path, name: str, parsed: TargetOverrides, *, allow_code: bool) -> TargetSpec:
    if (folder / "adapter_config.json").exists():
        return _from_adapter(folder, parsed, allow_code=allow_code)
    if (folder / "plan.json").exists():
        state = named_state(folder, name)
        find = _from_checkpoint if state.is_checkpoint else _from_result
        return replace(find(state.folder, parsed, allow_code=allow_code), notes=tuple(filter(None, [state.note])))
    if (folder / "config.json").exists() or (folder / PIPELINE_INDEX).exists():
        return _bare_model(str(folder), parsed)
    files = "neither an adapter (adapter_config.json), nor a run (plan.json), nor a model (config.json)"
    raise InputError(f"{folder} contains {files}", "name a folder that contains one of these files")


def _from_result(result: Path, parsed: TargetOverrides, *, allow_code: bool) -> TargetSpec:
    """The target for the exported result of a run."""
    recipe = load_run_recipe(result.parent, parsed.model, allow_code=allow_code)
    return replace(_from_weights("run", recipe, result, parsed), run=result.parent)


def _from_weights(kind: str, recipe: Recipe, weights: Path, parsed: TargetOverrides) -> TargetSpec:
    """The target for weights that a run exported: an adapter, or a model if the run trained its base."""
    if not recipe.adapter.trains_base:
        return _from_recipe(kind, recipe, weights, parsed)
    if "name_or_path" in parsed.model:
        what = "the run trained the whole model and not an adapter, so there is no base to choose"
        raise InputError(what, "leave --base out")
    bare = recipe.model_copy(update={"data": recipe.data.model_copy(update={"chat_template": None})})
    return _from_recipe(kind, bare, None, replace(parsed, model={**parsed.model, "name_or_path": str(weights)}))


def _from_recipe(kind: str, recipe: Recipe, adapter: Path | None, parsed: TargetOverrides) -> TargetSpec:
    evaluation, model = recipe.evaluation.model_copy(update=parsed.evaluation), parsed.model
    if adapter is not None and "name_or_path" not in model:
        base = base_section(read_adapter_config(adapter), {}, NAME_BASE)
        model = base.model_dump(include={"name_or_path", "revision"}, exclude_unset=True) | model
    return TargetSpec(kind, recipe.model.model_copy(update=model), evaluation, adapter, recipe)


def _from_checkpoint(checkpoint: Path, parsed: TargetOverrides, *, allow_code: bool) -> TargetSpec:
    """The target for a run's checkpoint, with the weights after the checkpoint's step."""
    holder = temporary_folder()
    weights, run = Path(holder.name) / "adapter", checkpoint.parent.parent
    export_checkpoint(checkpoint, weights, parsed.model, allow_code=allow_code)
    recipe = load_run_recipe(run, parsed.model, allow_code=allow_code)
    return replace(_from_weights("checkpoint", recipe, weights, parsed), run=run, holder=holder)


def _from_adapter(folder: Path, parsed: TargetOverrides, *, allow_code: bool) -> TargetSpec:
    """The target for an adapter folder. If the folder is in a run folder, the target also has the run's data."""
    run = folder.parent
    if folder.name == "adapter" and (run / "plan.json").exists():
        recipe = load_run_recipe(run, parsed.model, allow_code=allow_code)
        return replace(_from_recipe("adapter", recipe, folder, parsed), run=run)
    config = read_adapter_config(folder)
    model = base_section(config, parsed.model, NAME_BASE)
    nameless = config.objective is None
    return TargetSpec(
        "adapter",
        model,
        EvaluationSection().model_copy(update=parsed.evaluation),
        folder,
        labels=parsed.labels if nameless else (),
        problem_type=parsed.problem_type if nameless else None,
    )


def base_section(config: AdapterConfig, overrides: Mapping[str, Any], how: str) -> ModelSection:
    """The model section for the base that the adapter was trained on, with overrides applied.

    Raises: ModelError with the remedy `how` if the base is unknown.
    """
    facts: dict[str, Any] = {
        "dtype": config.base_dtype,
        "quantization": config.quantization,
        "double_quantization": config.double_quantization,
    }
    if "name_or_path" not in overrides:
        facts |= {"name_or_path": config.base_location(), "revision": config.revision}
        if facts["name_or_path"] is None:
            wanted = config.base_name_or_path or "an unnamed base"
            raise ModelError(f"the adapter {config.folder} belongs to {wanted}, which was not found", how)
    stated = {name: value for name, value in facts.items() if value is not None}
    return ModelSection.model_validate({**stated, **overrides})


def _bare_model(name: str, parsed: TargetOverrides) -> TargetSpec:
    model = ModelSection.model_validate({"name_or_path": name} | parsed.model)
    evaluation = EvaluationSection().model_copy(update=parsed.evaluation)
    return TargetSpec("model", model, evaluation, problem_type=parsed.problem_type)


def processor_of(target: TargetSpec) -> Processor:
    """The processor that makes rows for the target's base. Raises: ModelError."""
    return make_family(family_of(target)).processor(target.model)


def family_of(target: TargetSpec) -> str:
    """The family for loading the target's base: from its recipe, from its adapter, or the base's own family."""
    if target.recipe is not None:
        return str(target.recipe.objective.family)
    method, _ = stated_objective(target.adapter, target.model)
    if method in known_names("objectives"):
        return objective_class(method).family
    if target.adapter is None:
        return family_of_base(target.model)
    return adapter_family(read_adapter_config(target.adapter), target.model).name


def objective_of(target: TargetSpec, processor: Processor) -> Objective | None:
    """The objective that the target was or will be trained with, from its recipe, its adapter's folder or its base's
    files; None if these name none."""
    if target.recipe is not None:
        untrained = target.kind == "recipe"
        facts = start_facts(target.recipe) if untrained else stated_objective(target.adapter, target.model)[1]
        objective = make_objective(target.recipe.objective, processor, facts)
        drawn = untrained and "problem_type" in objective.facts  # the bias of a new head depends on rows
        if objective.complete and not drawn:
            return objective
        if target.run is not None and target.adapter is None:
            return None  # the model itself defines it: see measuring_objective
        return load_rows(target.recipe.data, objective, seed=target.seed).objective
    method, facts = stated_objective(target.adapter, target.model)
    if method in known_names("objectives") and not objective_class(method).needs_recipe:
        return make_objective(make_objective_settings({"method": method}), processor, facts)
    if target.adapter is None:
        return None
    facts = head_facts(read_adapter_config(target.adapter), target.model)
    facts = {**named_labels(facts, target.labels), **_stated(target.problem_type)}
    settings = supervised_objective(family_of(target), _scores(facts))
    return None if settings is None else make_objective(settings, processor, facts)


def with_objective(
    target: TargetSpec, processor: Processor, learned: Objective | None = None
) -> tuple[TargetSpec, Objective | None]:
    """The target with the model section that its objective requires, and the objective."""
    objective = learned or objective_of(target, processor)
    if objective is not None:
        target = replace(target, model=objective.section(target.model, target.seed))
    return target, objective


def trained_base(config: AdapterConfig, base: str | None) -> ModelSection:
    """The model section of the adapter's base (or `base`) with the trained head, which the base's own files may lack.

    Raises: ModelError if the base is unknown.
    """
    section = base_section(config, base_override(base), "name it with --base MODEL")
    target = TargetSpec("adapter", section, EvaluationSection(), adapter=config.folder)
    if make_family(family_of(target)).answers:
        return section
    return with_objective(target, processor_of(target))[0].model


def load_base(
    target: TargetSpec, device: torch.device, choice: ExecutionSettings | None = None, learned: Objective | None = None
) -> tuple[TargetSpec, LoadedModel, Processor, Objective]:
    """Load the target's base as the objective requires; returns the target, the base, its processor and the
    objective. `learned`: the objective, if the caller has already made it from the rows."""
    choice = choice or ExecutionSettings()
    with parsed_once(target.model.name_or_path):
        processor = processor_of(target)
        target, objective = with_objective(target, processor, learned)
        streamed = choice.streaming != "off"
        base = load_model(target.model, device=device, streamed=streamed, streamed_head=choice.streamed_head)
    return target, base, processor, objective or measuring_objective(base, processor, target.problem_type)


def load_target(target: TargetSpec, device: torch.device, learned: Objective | None = None) -> LoadedTarget:
    """Load the base, its adapter and its processor, ready for evaluation. `learned`: see `load_base`.

    If the recipe says so, the base's weights are streamed and MLPs are computed in tiles.
    """
    choice, attach = target.choice, None
    target, base, processor, objective = load_base(target, device, choice, learned)
    if target.adapter is not None:
        place = partial(attach_adapter_folder, base.net, target.adapter, device=base.device)
        attach = partial(place, head_name=base.family.head_name(base.net), base_fingerprint=base.fingerprint)
    model = prepare_network(base, choice, attach)
    _refuse_random(target, model)
    return LoadedTarget(target, model, processor, objective)


def _refuse_random(target: TargetSpec, model: TunedModel) -> None:
    """Refuse an adapter with random modules: neither the base's files nor the adapter contain their weights.

    Raises: ModelError.
    """
    if model.adapter is None or model.adapter.settings.trains_base:
        return
    lost = [name for name in model.base.new_modules if name not in model.adapter.copies]
    if lost:
        what = f"neither {target.adapter} nor its base {target.model.name_or_path} contains {', '.join(lost)}"
        how = f"they would be random; train the adapter again, in peft with modules_to_save: [{', '.join(lost)}, ...]"
        raise ModelError(what, how)
