"""`tunekit eval`: loss, perplexity and text metrics of a run, an adapter, a model, or the untuned base of a recipe."""

import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunekit.artifacts.fingerprint import EARLIER_SHARE, has_earlier_share
from tunekit.artifacts.report.next_step import after_evaluation
from tunekit.artifacts.report.tasks import change_table, score_table
from tunekit.artifacts.run import TASKS_NAME, read_json, refuse_to_replace_part
from tunekit.companions.base import load_companions
from tunekit.console import Console
from tunekit.console.progress import CountProgress
from tunekit.contracts import Progress
from tunekit.data.encoding.sources import read_template
from tunekit.data.reading.replaced import refuse_to_replace_named
from tunekit.data.reading.several import is_pattern
from tunekit.data.rows import RowSet, load_evaluation_rows
from tunekit.errors import InputError, ModelError, RecipeError
from tunekit.evaluation.by_adapter import check_adapters, rows_by_adapter, with_adapter
from tunekit.evaluation.evaluator import Evaluation, Evaluator, calibration_notes, queries_of
from tunekit.evaluation.row_losses import row_digest, unit_counts
from tunekit.evaluation.tasks.measure import measure_tasks
from tunekit.evaluation.tasks.run import load_tasks
from tunekit.files.durable import json_result, write_json
from tunekit.files.untrusted import parse_json, read_small
from tunekit.machine.devices import Devices, make_devices
from tunekit.metrics.classes import class_facts, columns_of, confused_pairs, never_right
from tunekit.metrics.retrieval import search_table
from tunekit.metrics.sources import sources_table
from tunekit.recipe.data import DataSection
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.load import override_data
from tunekit.recipe.reading.dump import yaml_scalar
from tunekit.recipe.reading.names import known_names, objective_class, shows_of, unmeasurable
from tunekit.targets.export import refuse_code
from tunekit.targets.reference import load_reference
from tunekit.targets.target import LoadedTarget, TargetSpec, find_target, load_target, measuring_objective
from tunekit.tuned.fit import row_problems


def evaluate_verb(
    target: str,
    base: str | None,
    data: str | None,
    format: str | None,
    metrics: Sequence[str],
    json_file: str | None,
    overrides: Sequence[str],
    adapter_column: str | None = None,
    *,
    allow_code: bool = False,
) -> None:
    """Evaluate a target. With `adapter_column`: evaluate each adapter that the rows name in this column. `allow_code`:
    code that a run's recipe names may run.

    Raises: TunekitError, whose exit code the command line returns.
    """
    _check_metrics(metrics)
    write_result = json_result(json_file)
    changes = [*([] if base is None else [f"model.name_or_path={yaml_scalar(base)}"]), *overrides]
    if data is None and format is not None:
        raise InputError("--format describes the file of --data, but --data is missing", "add --data FILE")
    if data is not None:
        overrides = [f"data.eval=[{{path: {yaml_scalar(data)}, format: {yaml_scalar(format or 'auto')}}}]", *overrides]
    of_data = [text for text in overrides if text.removeprefix("~").startswith("data")]
    spec = find_target(target, base, [text for text in overrides if text not in of_data], allow_code=allow_code)
    if spec.recipe is not None and spec.run is not None and not allow_code:
        refuse_code(spec.run, {"objective": spec.recipe.objective.model_dump()})
    if spec.recipe is not None:
        settings = spec.recipe.objective
        _refuse_unmeasurable(metrics, settings.method, settings.model_dump(), spec.evaluation)
    section = _data_section(spec, of_data)
    if adapter_column is not None:
        _check_many_adapters(spec, section)
    _refuse_rows(section, spec, data)
    refuse_to_replace_named("--json", json_file, {"data": section.model_dump(mode="json")}, Path(target))
    refuse_to_replace_part("--json", json_file, Path(target))
    template = None if section.chat_template is None else read_template(Path(section.chat_template))
    devices, columns = make_devices(), [] if adapter_column is None else [adapter_column]
    console = Console(enabled=devices.is_main, json_file=json_file)
    console.info(*spec.notes)
    with devices:
        console.info(f"loading {spec.model.name_or_path} ...")
        loaded = load_target(spec, devices.device)
        load_reference(loaded)
        read = partial(load_evaluation_rows, section, loaded.objective, seed=spec.seed, caller_columns=columns)
        rows = devices.main_first(read)
        loaded = _as_rows_need(loaded, rows, devices)
        loaded.model.companions = load_companions(rows.objective, devices.device)
        counted = f"evaluating {len(rows.evaluation or ()):,} rows ..."
        console.info(*rows.notes, *calibration_notes(spec.evaluation), counted)
        of_run, counting = spec.data or section, CountProgress(console)
        evaluate = partial(evaluate_rows, metrics=metrics, devices=devices, template=template, progress=counting)
        if adapter_column is not None:
            evaluations = _of_adapters(loaded, rows, section, adapter_column, partial(evaluate, data=section))
        else:
            evaluation = evaluate(loaded, rows, data=of_run)
    if devices.is_main and adapter_column is not None:
        values = {name: _values(loaded.objective.name, each) for name, each in evaluations.items()}
        write_result(_shown_adapters(console, target, values))
    elif devices.is_main:
        write_result(_shown(console, target, _values(loaded.objective.name, evaluation), evaluation))
        # the report of a run has only its unchanged evaluation
        kind = "model" if spec.kind == "run" and (changes or data is not None) else spec.kind
        console.next_steps(after_evaluation(target, kind, *_row_losses(rows, evaluation), changes=changes))


def _as_rows_need(loaded: LoadedTarget, rows: RowSet, devices: Devices) -> LoadedTarget:
    """The target, loaded again if only the rows show that the base's parts that read images are needed."""
    if loaded.objective.facts.get("images") or not rows.objective.facts.get("images"):
        return loaded
    return load_target(loaded.target, devices.device, rows.objective)


def _shown_adapters(console: Console, target: str, values: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Print the table of several adapters, and return the content of the JSON file."""
    names = list(dict.fromkeys(name for each in values.values() for name in each))
    lines = [[adapter, *(each.get(name) for name in names)] for adapter, each in values.items()]
    console.table(["adapter", *names], lines, title=target)
    return {"adapters": {adapter: _finite(each) for adapter, each in values.items()}}


def _shown(console: Console, target: str, values: Mapping[str, float], evaluation: Evaluation) -> dict[str, Any]:
    """Print the tables of an evaluation, and return the content of the JSON file."""
    console.table(["metric", "value"], [[name, value] for name, value in values.items()], title=target)
    result = _finite(values)
    if evaluation.sources is not None:
        result["sources"] = evaluation.sources
        console.table(*sources_table(evaluation.sources))
    if evaluation.search is not None:
        result["search"] = evaluation.search
        console.table(*search_table(evaluation.search))
    if evaluation.classes is not None:
        result["classes"] = class_facts(evaluation.classes)
        lines, columns = result["classes"]["per_class"], columns_of(result["classes"])
        console.table(columns, [[line[name] for name in columns] for line in lines])
        if (pairs := confused_pairs(result["classes"])) is not None:
            console.table(*pairs)
        if wrong := never_right(result["classes"]):
            console.info(f"labels with an F1 of 0: {', '.join(wrong)}")
    return result


def _values(objective: str, evaluation: Evaluation) -> dict[str, float]:
    """The metrics, without undefined metrics such as a correlation with a constant; and the numbers of rows, tokens and
    units."""
    sums, shows = evaluation.sums, shows_of(objective)
    sizes, units = (text.replace(" ", "_") for text in (shows.sizes, shows.units))
    defined = {name: value for name, value in evaluation.metrics.items() if name == "loss" or not math.isnan(value)}
    return {**defined, "rows": sums.rows, sizes: sums.tokens, units: int(sums.values["units"])}


def _row_losses(rows: RowSet, evaluation: Evaluation) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """The digest of each row (rows,), its loss (rows,), summed over its units, and its number of units (rows,). If a
    row has no finite loss, all three are empty."""
    measured, losses = evaluation.sums.row_losses, list[float]()
    units = [] if rows.evaluation is None else unit_counts(rows.evaluation, rows.objective)
    if len(measured) == len(units):
        losses = [measured[number] for number in range(len(units))]
    usable = losses and np.isfinite(losses).all()
    if not usable or rows.evaluation is None:
        return [], np.array([]), np.array([])
    digests = [row_digest(rows.evaluation[number]) for number in range(len(units))]
    return digests, np.array(losses, np.float64), np.array(units, np.float64)


def _finite(values: Mapping[str, float]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _check_many_adapters(spec: TargetSpec, section: DataSection) -> None:
    """Raises: InputError if the target is not a model, or if no file with evaluation rows is named."""
    if spec.kind != "model":
        raise InputError(
            "--adapter-column needs the adapters' base model as TARGET", "name a model, or remove --adapter-column"
        )
    if not isinstance(section.eval, tuple):
        raise InputError("--adapter-column needs a file whose rows name adapters", "name the file with --data FILE")


def _of_adapters(
    loaded: LoadedTarget,
    rows: RowSet,
    section: DataSection,
    column: str,
    evaluate: Callable[[LoadedTarget, RowSet], Evaluation],
) -> dict[str, Evaluation]:
    """The evaluation of each adapter on the rows that name this adapter in `column`. The key "base" has the evaluation
    of the base on rows that name no adapter."""
    assert isinstance(section.eval, tuple)  # _check_many_adapters ensures it
    base, groups = loaded.model.base, rows_by_adapter(rows, section.eval, column)
    check_adapters(base, [place for place in groups if place is not None], rows.objective)
    evaluations = {}
    for place, chosen in groups.items():
        with with_adapter(base, place) as model:
            evaluations["base" if place is None else str(place)] = evaluate(replace(loaded, model=model), chosen)
    return evaluations


def evaluate_tasks(
    target: str,
    base: str | None,
    tasks: Sequence[str],
    json_file: str | None,
    overrides: Sequence[str],
    *,
    allow_code: bool = False,
) -> None:
    """Evaluate a target on tasks of lm-eval. If the target has an adapter, also compare with its base.

    Raises: InputError if lm-eval is not installed, or for an unknown task; ModelError if the model is not a causal
    language model.
    """
    write_result, names = json_result(json_file), ", ".join(map(yaml_scalar, tasks))
    spec = find_target(target, base, [f"evaluation.tasks=[{names}]", *overrides], allow_code=allow_code)
    refuse_to_replace_part("--json", json_file, Path(target))
    devices = make_devices()
    console = Console(enabled=devices.is_main, json_file=json_file)
    console.info(*spec.notes)
    with devices:
        if devices.world > 1:
            raise InputError("tasks cannot be computed in several processes", "start tunekit without torchrun")
        chosen = load_tasks(spec.evaluation)
        console.info(f"loading {spec.model.name_or_path} ...")
        loaded = load_target(spec, devices.device)
        results = measure_tasks(
            loaded.model,
            loaded.tokenizer,
            measuring_objective(loaded.model.base, loaded.processor),
            chosen,
            devices,
            compares=loaded.model.adapter is not None,
            template=spec.chat_template,
            progress=CountProgress(console),
        )
    console.warn(*chosen.notes())
    values = results.values()
    console.table(*score_table(values["scores"], values["before"]), title=target)
    if values["changes"]:
        console.table(*change_table(values["changes"]))
    if (  # scores on a changed base are not those of the run
        spec.kind == "run"
        and spec.run is not None
        and spec.model == find_target(target, None, [], allow_code=True).model
    ):
        file, measured = spec.run / TASKS_NAME, {score["task"] for score in values["scores"]}
        earlier = read_json(file) or {}
        others = {part: [each for each in earlier.get(part, ()) if each["task"] not in measured] for part in values}
        write_json(file, {part: others[part] + values[part] for part in values})
        console.info(f"tunekit report {shlex.quote(target)} shows the scores")
    write_result(values)


def _check_metrics(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known_names("metrics")]
    if unknown:
        how = f"known metrics: {', '.join(known_names('metrics'))}"
        raise RecipeError(f"unknown metric {unknown[0]!r}", how, key="--metric")


def _refuse_unmeasurable(
    metrics: Sequence[str], objective: str, facts: Mapping[str, Any], evaluation: EvaluationSection
) -> None:
    """Raises: RecipeError for a metric that the objective does not measure."""
    for name in metrics:
        wrong = unmeasurable(name, objective_class(objective), facts, chosen=evaluation.choices is not None)
        if wrong is not None:
            raise RecipeError(*wrong, key="--metric")


def _refuse_rows(section: DataSection, target: TargetSpec, data: str | None) -> None:
    """Raises: InputError for a missing file, or for evaluation rows that a run of an earlier version has trained on."""
    _refuse_missing_files(section, target, data)
    _refuse_earlier_share(section, target)


def _refuse_missing_files(section: DataSection, target: TargetSpec, data: str | None) -> None:
    """Raises: InputError for a missing file. The error states the file's path during training, if the path was
    different then."""
    for number, source in enumerate(section.eval if isinstance(section.eval, tuple) else section.train):
        path = source.path
        if not os.path.isabs(path) or os.path.lexists(path) or is_pattern(path):
            continue
        if data is not None:
            raise InputError(f"{path}: no such file", "check the path of --data")
        earlier = "" if target.run is None else _path_in_training(target.run, section, number)
        moved = f" (in training it was {earlier})" if earlier not in ("", path) else ""
        raise InputError(f"{path}: no such file{moved}", "name a file of rows with --data FILE")


def _refuse_earlier_share(section: DataSection, target: TargetSpec) -> None:
    """Raises: InputError if the share of rows for evaluation has changed since the run, so that it contains training
    rows."""
    environment = None if target.run is None else read_json(target.run / "environment.json")
    if isinstance(section.eval, float) and has_earlier_share((environment or {}).get("fingerprint") or {}):
        how = "name a file of rows with --data FILE, or train again"
        raise InputError(f"{EARLIER_SHARE}, so this share would contain training rows", how, key="data.eval")


def _path_in_training(run: Path, section: DataSection, number: int) -> str:
    """A source's absolute path during training, read from the plan; empty if the plan does not state it."""
    plan = run / "plan.json"
    try:
        stated = parse_json(read_small(plan), str(plan))["recipe"]["data"]
        return str(stated["eval" if isinstance(section.eval, tuple) else "train"][number]["path"])
    except (InputError, KeyError, IndexError, TypeError):
        return ""


def _data_section(target: TargetSpec, overrides: Sequence[str]) -> DataSection:
    """The data section that names the evaluation rows: the section of the run or recipe, changed by the overrides."""
    data = target.data
    if (data is None or data.eval is None) and not any(text.startswith("data.eval") for text in overrides):
        whose = "this target has no recipe" if data is None else "the recipe has no data.eval"
        raise InputError(f"there are no evaluation rows: {whose}", "name a file with --data FILE")
    objective = None if target.recipe is None else target.recipe.objective.method
    section = override_data(data, overrides, objective)
    if section.chat_template is None and data is None and target.template_file is not None:
        return section.model_copy(update={"chat_template": str(target.template_file)})
    return section


def evaluate_rows(
    loaded: LoadedTarget,
    rows: RowSet,
    metrics: Sequence[str],
    devices: Devices,
    data: DataSection,
    template: str | None,
    progress: Progress,
) -> Evaluation:
    """Evaluate the model on the evaluation rows. `data`: the data section whose rows contain the choices, if the
    settings say `evaluation.choices: from_data`."""
    settings, model, evaluation = loaded.target.evaluation, loaded.model, rows.evaluation
    assert evaluation is not None  # _data_section ensures it
    _refuse_unmeasurable(metrics, rows.objective.name, rows.objective.facts, settings)
    problems = row_problems(model.base, loaded.processor, rows.objective.rows, [evaluation], model.virtual_tokens)
    if problems:
        raise ModelError.of(problems)
    evaluator = Evaluator(
        model,
        rows.objective,
        devices,
        evaluation,
        queries_of(rows, settings, metrics or settings.metrics, data),
        settings,
        metric_names=tuple(metrics),
        template=template,
        progress=progress,
    )
    return evaluator.evaluate()
