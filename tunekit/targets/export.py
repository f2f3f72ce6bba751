"""Exports trained weights as a folder: an adapter of a run, an adapter of a checkpoint (without loading the base's
weights), or a whole model."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.applied import check_applied
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.adapters.method import needs_reference_state
from tunekit.artifacts.checkpoint import Checkpoint, load_checkpoint
from tunekit.contracts import Answering, Objective, Processor, Tensors
from tunekit.data.encoding.sources import read_template
from tunekit.errors import InputError, ModelError, RunFolderError
from tunekit.model.families import make_family
from tunekit.model.load import LoadedModel, base_fingerprint, load_model, make_meta_model
from tunekit.model.storage.inspection import with_layers
from tunekit.model.storage.model_folder import atomic_model_folder, copy_other_files
from tunekit.model.storage.rewrite import Rewriter
from tunekit.model.storage.source import find_source
from tunekit.objectives.base import make_objective
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.paths import code_keys
from tunekit.recipe.recipe import Recipe
from tunekit.records import JsonObject, Target

NAME_BASE = "name the base with --base"
BUFFER_PREFIX = "adapter."  # in checkpoints: prefix of untrained adapter state (seeds, indices, importances)

REFERENCE_PREFIX = "reference."  # in checkpoints: prefix of the state at step 0, if the loss compares with it
STEP_0 = {"reference": "the adapter at step 0"}  # a fact of an exported objective whose reference is not the bare base


def export_adapter(
    folder: Path,
    base: LoadedModel,
    adapter: AttachedAdapter,
    objective: Objective,
    chat_template: str | None,
    fingerprint: str | None,
    measured: JsonObject | None = None,
) -> int:
    """Write the adapter's folder completely or not at all; returns its size in bytes. `chat_template`: the
    text of the recipe's template; `measured`: values that an evaluation computed for the adapter's folder."""
    size_bytes = save_adapter_folder(
        adapter,
        folder,
        base_name=base.facts.name_or_path,
        base_fingerprint=fingerprint,
        revision=base.facts.revision,
        base_dtype=base.facts.dtype,
        quantization=base.facts.quantization,
        double_quantization=base.facts.double_quantization,
        task_type=base.family.task_type,
        chat_template=chat_template,
        objective=_objective_facts(objective, adapter, measured),
        of_pipeline=base.family.is_pipeline,
    )
    if not base.family.is_pipeline:
        check_applied(adapter.net, folder)
    return size_bytes


def export_model(
    folder: Path,
    section: ModelSection,
    base: LoadedModel,
    adapter: AttachedAdapter,
    processor: Processor,
    chat_template: str | None,
    answering: Answering | None,
) -> int:
    """Write the trained base completely or not at all, in the dtype of its files, with one shard at a time in memory;
    returns its size in bytes. `chat_template`: the text of the recipe's template."""
    rewriter = Rewriter(section, "full", loaded=base)
    with atomic_model_folder(folder) as staging:
        rewriter.write(staging, rewriter.as_changes(adapter.trained()))
        copy_other_files(section, rewriter.source.folder, processor, chat_template, staging, answering)
    return sum(path.stat().st_size for path in folder.iterdir())


def _objective_facts(objective: Objective, adapter: AttachedAdapter, measured: JsonObject | None) -> dict[str, Any]:
    step_0 = STEP_0 if needs_reference_state(objective, adapter.settings, exported=True) else {}
    return {"method": objective.name, **objective.facts, **(measured or {}), **step_0}


def facts_for_export(adapter: AttachedAdapter, objective: Objective, measured: JsonObject) -> dict[str, Any]:
    """The values that a checkpoint stores for the export of its adapter, besides tensors: settings, targets and
    objective. Each `auto` is replaced by its value."""
    return {
        "settings": adapter.settings.model_dump(mode="json", exclude={"init_from"}),
        "targets": [asdict(target) for target in adapter.targets],
        "objective": _objective_facts(objective, adapter, measured),
    }


def _require_base(section: ModelSection) -> None:
    """Raises: ModelError, with the advice to name the base, if the recipe's base is not found."""
    try:
        find_source(section, weights=False)
    except ModelError as error:
        raise ModelError(error.problems[0].what, NAME_BASE, key="model.name_or_path") from error


def load_run_recipe(run: Path, model: Mapping[str, Any], *, allow_code: bool = False) -> Recipe:
    """The recipe of a run folder. `model`: overrides of its model section, written by the user.

    A run folder may come from somebody else. So its recipe cannot let the base's code run: the user does this.
    Raises: InputError if the user has not decided.
    """
    recipe = load_recipe(run / "recipe.yaml").recipe
    if recipe.model.trust_remote_code and not allow_code and "trust_remote_code" not in model:
        what = f"the base of the run {run} has Python code, {recipe.model.name_or_path}"
        how = (
            "read the code; if you trust it, add model.trust_remote_code=true, or --allow-code to adapter diff and "
            "adapter export-checkpoint; if the run is a reward model, write allow_code: true next to its model"
        )
        raise InputError(what, how, key="model.trust_remote_code")
    return recipe


def refuse_code(run: Path, values: Mapping[str, Any]) -> None:
    """Refuse a run whose recipe lets code run: of the base, a companion or a reward. `values`: the recipe's.

    Raises: InputError.
    """
    if keys := list(code_keys(values)):
        what = f"the recipe of the run {run} lets Python code run"
        raise InputError(what, "read the code; if you trust it, add --allow-code", key=", ".join(keys))


def export_checkpoint(checkpoint: Path, folder: Path, model: Mapping[str, Any], *, allow_code: bool = False) -> int:
    """Write the folder that the run would have exported after this step: an adapter, or the model if the run trains its
    base. Returns its size in bytes.

    `model`, `allow_code`: as for load_run_recipe.
    Raises: RunFolderError, ModelError, InputError.
    """
    recipe_file = checkpoint.parent.parent / "recipe.yaml"
    if not recipe_file.exists():
        what = f"{checkpoint} is not in a run folder: {recipe_file} is missing"
        raise RunFolderError(what, "move the checkpoint back to the folder where the run wrote it")
    recipe = load_run_recipe(recipe_file.parent, model, allow_code=allow_code)
    saved = load_checkpoint(checkpoint)
    facts = saved.facts.get("export")
    if facts is None:
        what = f"{checkpoint} was written by an older tunekit, and cannot be exported"
        raise RunFolderError(what, "finish the run with --resume")
    section = recipe.model.model_copy(update=model)
    _require_base(section)
    named = {key: value for key, value in facts["objective"].items() if key not in ("method", *STEP_0)}
    processor = make_family(recipe.objective.family).processor(section)
    objective = make_objective(recipe.objective, processor, with_layers(named, section))
    section, cpu = objective.section(section, recipe.training.seed), torch.device("cpu")
    fingerprint = base_fingerprint(section)
    if fingerprint != saved.facts["fingerprint"]["base"]:
        what = f"{checkpoint} was trained on a different base than {section.name_or_path} (their fingerprints differ)"
        raise RunFolderError(what, "name the right base with --base")
    trains_base = recipe.adapter.trains_base
    base = load_model(section, device=cpu) if trains_base else make_meta_model(section, device=cpu)
    adapter = _adapter_of(saved, recipe, base)
    path = recipe.data.chat_template
    template = None if path is None else read_template(Path(path))
    if trains_base:
        section = section.model_copy(update=saved.facts["loop"].get("measured_facts", {}))
        return export_model(folder, section, base, adapter, processor, template, objective.answering)
    return export_adapter(folder, base, adapter, objective, template, fingerprint)


def _adapter_of(saved: Checkpoint, recipe: Recipe, base: LoadedModel) -> AttachedAdapter:
    """Attach the adapter of a checkpoint to its base, with the checkpoint's weights."""
    facts = saved.facts["export"]
    settings = type(recipe.adapter).model_validate(facts["settings"])
    adapter = attach_adapter(
        base.net,
        settings.model_copy(update={"init_from": recipe.adapter.init_from}),
        seed=0,
        head_name=base.family.head_name(base.net),
        device=torch.device("cpu"),
        targets=[Target(**target) for target in facts["targets"]],
        loads_state=True,
    )
    adapter.load_state(adapter_state(saved.tensors, saved.facts["layout"]))
    return adapter


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors of a checkpoint whose names start with `prefix`. The prefix is removed from the names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def adapter_state(tensors: Mapping[str, Tensor], layout: list[Mapping[str, list[int]]]) -> Tensors:
    """The adapter's tensors by name. The trained tensors of a parameter group are views of the group's buffer."""
    state = with_prefix(tensors, BUFFER_PREFIX)
    for number, group in enumerate(layout):
        weights = tensors[f"group{number}.weights"]
        for name, (start, *shape) in group.items():
            state[name] = weights[start : start + math.prod(shape)].view(shape)
    return state
