"""`tunekit eval`: loss, perplexity and text metrics of a run, an adapter, a model, or a recipe's untuned base.

Comes in: TARGET and, for what has no recipe, --data.  Goes out: a table, and --json.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tunekit.console import Console
from tunekit.data.rows import RowSet, load_evaluation_rows
from tunekit.errors import InputError, ModelError, RecipeError
from tunekit.files.durable import json_result
from tunekit.machine.devices import Devices, make_devices
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.names import known_names
from tunekit.tuned.evaluator import Evaluator, questions_for
from tunekit.tuned.fit import row_problems
from tunekit.tuned.target import LoadedTarget, Target, find_target, load_target


def evaluate_verb(
    target: str,
    base: str | None,
    data: str | None,
    format: str | None,
    metrics: Sequence[str],
    json_file: str | None,
    overrides: Sequence[str],
) -> None:
    """Evaluate TARGET. Raises: TunekitError, whose exit code the command line returns."""
    _check_metrics(metrics)
    write_result = json_result(json_file)
    found = find_target(target, base, overrides)
    section = _data_section(found, data, format)
    devices = make_devices()
    console = Console(enabled=devices.is_main)
    console.info(*found.rewrites)
    try:
        loaded = load_target(found, devices.device)
        rows = devices.main_first(lambda: load_evaluation_rows(section, loaded.objective, seed=found.seed))
        console.info(*rows.notes)
        values = evaluate_rows(loaded, rows, metrics, devices)
    finally:
        devices.close()
    if devices.is_main:
        console.table(["metric", "value"], [[name, value] for name, value in values.items()], title=target)
        write_result({name: value for name, value in values.items() if math.isfinite(value)})


def _check_metrics(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known_names("metrics")]
    if unknown:
        raise RecipeError(
            f"unknown metric {unknown[0]!r}", f"known metrics: {', '.join(known_names('metrics'))}", key="--metric"
        )


def _data_section(target: Target, data: str | None, format: str | None) -> DataSection:
    """The rows to evaluate: --data as an eval source, or the eval rows of the run or recipe."""
    if data is not None:
        path = str(Path(data).resolve()) if Path(data).exists() else data
        source = Source(path=path, format=format or "auto")
        own = target.data
        if own is None:
            template = None if target.template_file is None else str(target.template_file)
            return DataSection(train=(source,), eval=(source,), chat_template=template)
        return own.model_copy(update={"train": (source,), "eval": (source,)})
    if format is not None:
        raise InputError("--format says how to read --data, which is not given", "give --data FILE")
    if target.data is None:
        raise InputError("there is nothing to evaluate on: this target has no recipe", "give the rows with --data FILE")
    if target.data.eval is None:
        raise InputError(
            "the recipe has no data.eval, so there is nothing to evaluate on", "give the rows with --data FILE"
        )
    return target.data


def evaluate_rows(
    loaded: LoadedTarget, rows: RowSet, metrics: Sequence[str], devices: Devices
) -> dict[str, float | int]:
    """Every metric by name, and what it was measured on."""
    settings, model = loaded.target.evaluation, loaded.model
    evaluation = rows.evaluation
    assert evaluation is not None  # _data_section saw to it
    problems = row_problems(model.base, loaded.tokenizer, rows.objective, [evaluation], model.virtual_tokens)
    if problems:
        raise ModelError.of(problems)
    evaluator = Evaluator(
        model,
        rows.objective,
        devices,
        evaluation,
        questions_for(rows, metrics or settings.metrics),
        settings,
        metric_names=tuple(metrics),
        template=loaded.target.chat_template,
    )
    sums, values = evaluator.evaluate()
    return {**values, "rows": sums.rows, "tokens": sums.tokens, "supervised_tokens": int(sums.values["units"])}
