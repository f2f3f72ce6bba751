"""Which label each row of a trained head stands for: of the base's own head, and of an adapter's."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tunekit.adapters.folder.config import AdapterConfig, adapter_header, read_adapter_config, tensors_path
from tunekit.contracts import default_labels
from tunekit.errors import RecipeError
from tunekit.formats.labels import SINGLE_LABEL, label_text
from tunekit.model.families import Family, known_families, make_family
from tunekit.model.storage.inspection import family_of_base, head_labels
from tunekit.model.storage.source import find_source
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.recipe import Recipe
from tunekit.records import JsonObject


def start_facts(recipe: Recipe) -> JsonObject:
    """What a classifier begins with: `head`, labels of the base's own; `labels`, of the adapter that is continued.

    Raises: AdapterError; RecipeError where the recipe lists other labels than the head has, or another order.
    """
    start, settings = recipe.adapter.init_from, recipe.objective
    if not settings.has_head:
        return {}
    head = _head_labels(recipe.model, settings.family)
    if not settings.names_labels:
        return {"head": head}
    listed = settings.listed_labels
    head = _as_listed(head, listed)
    if start is None:
        _refuse_other_order("the base's head", head if set(head) == set(listed) else (), listed)
        return {"head": head}
    config = read_adapter_config(Path(start))
    trained = adapter_facts(config, recipe.model)
    _refuse_other_problem_type(config, trained, settings)
    labels = _as_listed(trained.get("labels", ()), listed)
    _refuse_other_order(str(config.folder), labels, listed)
    return {"head": head, "labels": labels}


def adapter_facts(config: AdapterConfig, base: ModelSection) -> JsonObject:
    """What the folder says of its objective, without the method; of another tool's adapter, its head's labels."""
    if config.objective is not None:
        return {key: value for key, value in config.objective.items() if key != "method"}
    return head_facts(config, base)


def head_facts(config: AdapterConfig, base: ModelSection) -> JsonObject:
    """One label for each row of the last matrix of another tool's head: the base's where it has as many."""
    header, family = adapter_header(tensors_path(config.folder)), adapter_family(config, base)
    named = set(family.head_parts[-1:]) or _modules_to_save(config)
    matrices = {name: entry.shape for name, entry in header.items() if len(entry.shape) == 2}
    shapes = [shape for name, shape in matrices.items() if named & set(name.split("."))]
    if not shapes:
        return {}
    widths = Counter(inputs for _, inputs in shapes)  # a pooler's outputs are what the next matrix takes
    last = [rows for rows, inputs in shapes if widths[rows] == (rows == inputs)] or [rows for rows, _ in shapes]
    own = _head_labels(base, family.name) if family.labelled else ()
    return {"labels": own if len(own) == min(last) else default_labels(min(last))}


def named_labels(facts: JsonObject, labels: tuple[str, ...]) -> JsonObject:
    """What is known of a head, its rows called as the user calls them. Raises: RecipeError for another number."""
    if labels and len(labels) != (rows := len(facts.get("labels", ()))):
        what = f"names {len(labels)} labels, and the adapter's head has {rows} rows"
        raise RecipeError(what, "name one for each row, in their order", key="objective.labels")
    return {**facts, "labels": labels} if labels else facts


def adapter_family(config: AdapterConfig, base: ModelSection) -> Family:
    """The family as which another tool's adapter has its base loaded: that of PEFT's task, or of the class that PEFT
    names where it has no task for it and the base's files name another (a vision model without a head); or the
    base's own."""
    tasks = {family.task_type: family for family in known_families() if family.task_type}
    own = tasks.get(config.task_type or "") or _family_of_class(config.fields.get("auto_mapping"))
    return own or make_family(family_of_base(base)).with_head(_modules_to_save(config))


def _family_of_class(mapping: object) -> Family | None:
    """The family with a head of labels whose classes have this name's ending; the name is compared, never imported."""
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    labelled = [family for family in known_families() if family.labelled and family.endings]
    return next((family for family in labelled if str(name).endswith(family.endings)), None)


def _modules_to_save(config: AdapterConfig) -> set[str]:
    return set(getattr(config.settings, "modules_to_save", ()))


def _head_labels(base: ModelSection, family: str) -> tuple[str, ...]:
    return head_labels(find_source(base, weights=False), family)


def _as_listed(labels: Sequence[str], listed: tuple[str, ...]) -> tuple[str, ...]:
    """The labels; those of the recipe where a head of as many rows has no names for its own, or spells true and false
    otherwise."""
    own = tuple(map(str, labels))
    same = own == default_labels(len(own)) or tuple(map(label_text, own)) == listed
    return listed if len(own) == len(listed) and same else own


def _refuse_other_problem_type(config: AdapterConfig, trained: JsonObject, settings: ObjectiveSettings) -> None:
    """Raises: RecipeError where the folder states what its scores mean, and the recipe has them mean something else."""
    here, there = getattr(settings, "problem_type", SINGLE_LABEL), trained.get("problem_type", SINGLE_LABEL)
    if config.objective is not None and here != there:
        what = f"is {here}, and {config.folder} was trained for {there}"
        raise RecipeError(what, f"write {there}, or train from the base", key="objective.problem_type")


def _refuse_other_order(whose: str, labels: tuple[str, ...], listed: tuple[str, ...]) -> None:
    if labels and listed and labels != listed:
        what = f"{whose} has the labels {', '.join(labels)}, in this order"
        raise RecipeError(what, "list them so, or leave labels out", key="objective.labels")
