"""report.json and report.md of a finished run.

Comes in: ReportFacts and Plan.  Goes out: the two files in the run folder.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from tunekit.artifacts.report.page import make_page
from tunekit.artifacts.run import RunFolder
from tunekit.errors import redact
from tunekit.records import Plan, ReportFacts

OPTIONAL_TABLES = ("seconds", "rows", "predicted_bytes", "measured_bytes")


def report_values(facts: ReportFacts) -> dict[str, Any]:
    """report.json: every fact that was measured; what was not is absent, never null or zero in its place."""
    values: dict[str, Any] = _measured(asdict(facts))
    return {name: value for name, value in values.items() if value or name not in OPTIONAL_TABLES}


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
    """Write report.json, then report.md, each whole or not at all."""
    run.write_json("report.json", report_values(facts))
    losses = [record["loss"] for record in run.read_metrics() if "eval" not in record]
    run.write_text("report.md", make_page(run.path, facts, plan, losses))
