"""Finds in a base's files or in an adapter the objective of the training, and the labels of a trained head, one per row
of its last matrix."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tunekit.adapters.folder.config import AdapterConfig, adapter_header, read_adapter_config, tensors_path
from tunekit.contracts import default_labels
from tunekit.errors import RecipeError
from tunekit.formats.labels import SINGLE_LABEL, label_text
from tunekit.model.families import Family, known_families, make_family
from tunekit.model.storage.inspection import base_objective, family_of_base, head_labels, with_layers
from tunekit.model.storage.source import find_source
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.recipe import Recipe
from tunekit.records import JsonObject
from tunekit.targets.export import STEP_0


def start_facts(recipe: Recipe) -> JsonObject:
    """Facts of the base that its objective reads. For a classifier these are the labels that are known before training.
    `head`: labels of the base's own head. `labels`: labels of the adapter that training continues.

    Raises: AdapterError; RecipeError if the recipe's labels, or their order, differ from the head's.
    """
    start, settings = recipe.adapter.init_from, recipe.objective
    if not settings.has_head:
        return make_family(settings.family).base_facts(recipe.model)
    head = _head_labels(recipe.model, settings.family)
    if not settings.names_labels:
        return {"head": head, **make_family(settings.family).base_facts(recipe.model)}
    listed = settings.listed_labels
    head = _as_listed(head, listed)
    if start is None:
        _refuse_other_order("the base's head", head if set(head) == set(listed) else (), listed)
        return {"head": head}
    config = read_adapter_config(Path(start))
    trained = head_facts(config, recipe.model) if config.objective is None else dict(config.objective)
    _refuse_other_problem_type(config, trained, settings)
    labels = _as_listed(trained.get("labels", ()), listed)
    _refuse_other_order(str(config.folder), labels, listed)
    return {"head": head, "labels": labels}


def stated_objective(adapter: Path | None, base: ModelSection) -> tuple[str | None, JsonObject]:
    """The name and the facts of the objective that an adapter's folder states or, without an adapter, the base's files.
    None and no facts if they state none. Raises: AdapterError or ModelError."""
    stated = base_objective(base) if adapter is None else read_adapter_config(adapter).objective or {}
    facts = {key: value for key, value in stated.items() if key not in ("method", *STEP_0)}
    facts = facts if adapter is None else with_layers(facts, base)
    if "labels" in facts:
        facts.setdefault("pairs", False)  # the folder of an adapter for pairs of texts states it
    return stated.get("method"), facts


def head_facts(config: AdapterConfig, base: ModelSection) -> JsonObject:
    """The labels of a head that another tool trained, one per row of its last matrix: the base's labels if their number
    is equal, otherwise default names."""
    header, family = adapter_header(tensors_path(config.folder)), adapter_family(config, base)
    named = set(family.head_parts[-1:]) or _modules_to_save(config)
    matrices = {name: entry.shape for name, entry in header.items() if len(entry.shape) == 2}
    shapes = [shape for name, shape in matrices.items() if named & set(name.split("."))]
    if not shapes:
        return {}
    widths = Counter(inputs for _, inputs in shapes)  # a pooler's outputs are the next matrix's inputs
    last = [rows for rows, inputs in shapes if widths[rows] == (rows == inputs)] or [rows for rows, _ in shapes]
    base_labels = _head_labels(base, family.name) if family.labelled else ()
    return {"labels": base_labels if len(base_labels) == min(last) else default_labels(min(last))}


def named_labels(facts: JsonObject, labels: tuple[str, ...]) -> JsonObject:
    """`facts` of a head, with the user's labels for its outputs. Raises: RecipeError if the counts differ."""
    if labels and len(labels) != (rows := len(facts.get("labels", ()))):
        what = f"names {len(labels)} labels, but the adapter's head has {rows} rows"
        raise RecipeError(what, "name one label for each row, in the order of the rows", key="objective.labels")
    return {**facts, "labels": labels} if labels else facts


def adapter_family(config: AdapterConfig, base: ModelSection) -> Family:
    """The family for loading the base of another tool's adapter: the family of PEFT's task type. Without a task type
    (vision models): the family of the class that PEFT names, or else the base's own family."""
    tasks = {family.task_type: family for family in known_families() if family.task_type and not family.trained_as}
    family = tasks.get(config.task_type or "") or _family_of_class(config.fields.get("auto_mapping"))
    return family or make_family(family_of_base(base)).with_head(_modules_to_save(config))


def _family_of_class(mapping: object) -> Family | None:
    """The family that matches the ending of the base's class name. The class is never imported."""
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    labelled = [family for family in known_families() if family.labelled and family.endings]
    return next((family for family in labelled if str(name).endswith(family.endings)), None)


def _modules_to_save(config: AdapterConfig) -> set[str]:
    return set(getattr(config.settings, "modules_to_save", ()))


def _head_labels(base: ModelSection, family: str) -> tuple[str, ...]:
    return head_labels(find_source(base, weights=False), family)


def _as_listed(labels: Sequence[str], listed: tuple[str, ...]) -> tuple[str, ...]:
    """The recipe's labels if they differ from the head's labels only in the spelling of true and false, or if the head
    has the same number of labels with default names. Otherwise the head's labels."""
    names = tuple(map(str, labels))
    same = names == default_labels(len(names)) or tuple(map(label_text, names)) == listed
    return listed if len(names) == len(listed) and same else names


def _refuse_other_problem_type(config: AdapterConfig, trained: JsonObject, settings: ObjectiveSettings) -> None:
    """Raises: RecipeError if the recipe's problem type differs from the problem type in the adapter's folder."""
    here, there = getattr(settings, "problem_type", SINGLE_LABEL), trained.get("problem_type", SINGLE_LABEL)
    if config.objective is not None and here != there:
        what = f"is {here}, but {config.folder} was trained for {there}"
        raise RecipeError(what, f"write {there}, or train from the base", key="objective.problem_type")


def _refuse_other_order(whose: str, labels: tuple[str, ...], listed: tuple[str, ...]) -> None:
    if labels and listed and labels != listed:
        what = f"{whose} has the labels {', '.join(labels)}, in this order"
        raise RecipeError(what, "list them in this order, or remove labels", key="objective.labels")
