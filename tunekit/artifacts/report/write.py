"""report.json, report.md and report.html of a finished run.

Comes in: ReportFacts and Plan.  Goes out: the files in the run folder.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from tunekit.artifacts.report.html import run_page
from tunekit.artifacts.report.page import make_page
from tunekit.artifacts.report.values import run_values
from tunekit.artifacts.run import RunFolder
from tunekit.errors import redact
from tunekit.records import Plan, ReportFacts

OPTIONAL_TABLES = ("seconds", "rows", "predicted_bytes", "measured_bytes")


def report_values(facts: ReportFacts, plan: Plan | None = None) -> dict[str, Any]:
    """report.json: what was run, and every fact that was measured; what was not is absent, never null or zero."""
    run = {} if plan is None else _run_facts(plan)
    values: dict[str, Any] = _measured({**run, **asdict(facts)})
    return {name: value for name, value in values.items() if value or name not in OPTIONAL_TABLES}


def _run_facts(plan: Plan) -> dict[str, Any]:
    """What two runs are compared by: model, method, rates, seed."""
    recipe, choice = plan.recipe, plan.choice
    training, count = recipe.get("training", {}), choice.micro_batch_size
    names = ("learning_rate", "loraplus_ratio", "scheduler", "optimizer", "weight_decay", "seed")
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


def _measured(value: object) -> Any:
    """The value without secrets and without its unmeasured parts: None, NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        kept = {name: _measured(inner) for name, inner in value.items()}
        return {name: inner for name, inner in kept.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_measured(inner) for inner in value]
    return value


def write_report(run: RunFolder, facts: ReportFacts, plan: Plan) -> None:
    """Write report.json, then the two pages, each whole or not at all."""
    run.write_json("report.json", report_values(facts, plan))
    steps = [record for record in run.read_metrics() if "eval" not in record]
    losses, rewards = ([record[name] for record in steps if name in record] for name in ("loss", "reward"))
    run.write_text("report.md", make_page(run.path, facts, plan, losses, rewards))
    run.write_text("report.html", run_page(run_values(run.path)))
