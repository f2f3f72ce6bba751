"""Writes report.json, report.md and report.html of a finished run."""

import math
from dataclasses import asdict, replace

from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.markdown import markdown_page
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.values import Values, run_values
from tunekit.artifacts.run import RunFolder
from tunekit.errors import redact
from tunekit.records import Plan, ReportFacts

OPTIONAL_TABLES = ("seconds", "rows", "predicted_bytes", "measured_bytes")


def report_values(facts: ReportFacts, plan: Plan | None = None) -> dict[str, object]:
    """The content of report.json: facts about the run and all measured values. Values that were not measured are left
    out."""
    values = asdict(facts)
    headline = values.pop("headline")
    measured = _measured({**({} if plan is None else _run_facts(plan)), **values, **headline})
    return {name: value for name, value in measured.items() if value or name not in OPTIONAL_TABLES}


def _run_facts(plan: Plan) -> dict[str, object]:
    """The facts that comparisons of runs show: model, method, rates, seed."""
    recipe, choice = plan.recipe, plan.choice
    training, count = recipe.get("training", {}), choice.micro_batch_size
    names = ("learning_rate", "head_learning_rate", "loraplus_ratio", "scheduler", "optimizer", "weight_decay", "seed")
    return {
        "tunekit_version": plan.tunekit_version,
        "device": plan.device,
        "model": asdict(plan.model),
        "method": recipe.get("adapter", {}).get("method"),
        "adapter": recipe.get("adapter"),
        "objective": recipe.get("objective", {}).get("method"),
        **{name: training.get(name) for name in names},
        "warmup_steps": plan.warmup_steps,
        "rows_per_step": count and count * choice.gradient_accumulation_steps,
        "max_length": recipe.get("data", {}).get("max_length"),
        "total_parameters": plan.total_parameters,
    }


def _measured(values: dict[str, object]) -> dict[str, object]:
    """The values without secrets. None, NaN and infinities are left out, because they stand for values that were not
    measured."""
    return {name: inner for name, value in values.items() if (inner := _measured_value(value)) is not None}


def _measured_value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return _measured(value)
    return [_measured_value(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_report(run: RunFolder, facts: ReportFacts, plan: Plan, reason: str = "finished") -> None:
    """Write report.json, then the report as Markdown and as HTML. Each file is written completely or not at all.
    `reason`: the reason that status.json will contain, which is written last."""
    run.write_json("report.json", report_values(facts, plan))
    report, status = Values(run.read_json("report.json") or {}), Values(exit_code=0, reason=reason)
    page = run_report(replace(run_values(run.path), report=report, status=status))
    run.write_text("report.md", markdown_page(page))
    run.write_text("report.html", html_page(page))
