"""report.html: one run, or several compared, as a page that needs no network. RunValues go in, its text comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from tunekit import __version__
from tunekit.artifacts.report.compare import differing_keys, outcome_table, same_but_seed
from tunekit.artifacts.report.curves import binned, charts_of
from tunekit.artifacts.report.paired import differences, heading
from tunekit.artifacts.report.pictures import shown_pictures
from tunekit.artifacts.report.values import RunValues
from tunekit.errors import redact
from tunekit.metrics.classes import COLUMNS, confusion_table
from tunekit.metrics.sources import sources_table
from tunekit.recipe.reading.names import sizes_of, units_of
from tunekit.records import bytes_text, calibration_text, skipped_text

PARTS = ("weights", "adapter", "optimizer", "activations", "logits")
MOST_CHARACTERS = 240  # of a prompt above its answers
REST = "the process and what its allocator keeps"


@cache
def _asset(name: str) -> str:
    return files("tunekit.artifacts.report").joinpath("assets", name).read_text("utf-8")


def run_page(run: RunValues) -> str:
    """The page of one run, finished or not."""
    sections = [
        _evaluations(run),
        *_classes(run),
        *(_section("Images", **each) for each in shown_pictures(run.path, run.recipe, run.exported_step)),
        _samples(run),
        _completions(run),
        _worst_rows(run),
        _memory(run),
        _time(run),
        _rows(run),
        _reactions(run),
    ]
    charts = charts_of([run])
    return _page(
        {
            "title": run.name,
            "intro": _intro(run),
            "verdict": _verdict(run),
            "tiles": _tiles(run),
            "charts": charts,
            "binned": _binned([run]),
            "lead": [],
            "sections": [*(section for section in sections if section), _sources(run)],
        }
    )


def comparison_page(runs: Sequence[RunValues]) -> str:
    """Several runs: what differs between their recipes, what came of them, their curves over each other."""
    keys, outcome, repeats = differing_keys(runs), outcome_table(runs), same_but_seed(runs)
    sections = [
        _section("What came of them", tables=[_table("", ["run", *outcome.labels], outcome.texts())]),
        _section(
            "What differs",
            text=[] if keys else ["Nothing: the recipes are the same but for output.dir."],
            tables=[_table("", ["key", *(run.name for run in runs)], keys)] if keys else [],
        ),
    ]
    paired = differences(runs)
    if paired:
        lines = [each.texts() for each in paired]
        text = [f"The loss of each run on the evaluation rows that {runs[0].name} evaluated too, row by row."]
        table = _table("", heading(runs[0].name), lines)
        sections.insert(1, _section("Better, or by chance?", text=text, tables=[table]))
    if repeats:
        lines = [[name, *cells] for name, cells in repeats]
        head = ["runs that differ in the seed alone", *outcome.labels]
        sections.insert(1, _section("Mean and standard deviation over seeds", tables=[_table("", head, lines)]))
    return _page(
        {
            "title": f"{len(runs)} runs compared",
            "intro": [", ".join(run.name for run in runs)],
            "verdict": None,
            "tiles": [],
            "charts": charts_of(runs),
            "binned": _binned(runs),
            "lead": sections,
            "sections": [],
        }
    )


def _page(page: dict[str, Any]) -> str:
    data = json.dumps({"charts": _redacted(page["charts"])}, separators=(",", ":"))
    files = {"uplot_css": "uplot.css", "uplot_js": "uplot.js", "uplot_license": "uplot-license.txt"}
    raw = {name: _asset(file) for name, file in {**files, "page_js": "page.js"}.items()}
    return render("page.html.jinja", page, **raw, data=data.replace("<", "\\u003c"))


def render(template: str, page: dict[str, Any], **raw: str) -> str:
    """A template of assets with a page's values, without access tokens; `raw` is put in as it is."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    made = environment.from_string(_asset(template))
    return made.render(page=_redacted(page), version=__version__, page_css=_asset("page.css"), **raw)


def _redacted(value: Any) -> Any:
    """The same without access tokens in any of its texts."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: _redacted(inner) for name, inner in value.items()}
    return [_redacted(inner) for inner in value] if isinstance(value, list | tuple) else value


def _section(title: str, **parts: Any) -> dict[str, Any]:
    return {"title": title, "text": [], "tables": [], "bars": [], "folds": [], "pictures": [], **parts}


def _table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[object]], best: int = -1, texts: bool = False
) -> Any:
    cells = [[_number(cell) for cell in row] for row in rows]
    lines = [{"cells": row, "best": at == best, "text": []} for at, row in enumerate(cells)]
    return {"title": title, "head": list(head), "rows": lines, "texts": texts}


def _number(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _binned(runs: Sequence[RunValues]) -> str:
    steps = binned(runs)
    return "" if steps == 1 else f"Each point is the mean of up to {steps} steps; metrics.jsonl holds every step."


def _intro(run: RunValues) -> list[str]:
    plan, recipe = run.plan, run.recipe
    model, adapter, objective = plan.get("model", {}), recipe.get("adapter", {}), recipe.get("objective", {})
    rank = f" of rank {adapter['r']}" if adapter.get("r") else ""
    weights = "" if model.get("quantization", "none") == "none" else f", weights in {model['quantization']}"
    computed = f"{model.get('model_type')}, computed in {model.get('dtype')}{weights}"
    trained, total = plan.get("trainable_parameters", 0), plan.get("total_parameters", 0)
    share, steps = f"{trained / max(total, 1):.2%}", f"{len(run.steps):,} of {plan.get('steps', 0):,} steps"
    return [
        f"{adapter.get('method')}{rank}, objective {objective.get('method')}, on {model.get('name_or_path')} "
        f"({computed}) on {plan.get('device')}.",
        f"{trained:,} of {total:,} parameters ({share}) trained in {steps}. State: {run.state}.",
    ]


def _verdict(run: RunValues) -> dict[str, str] | None:
    report = run.report
    if report.get("verdict"):
        return {"kind": "bad", "text": report["verdict"]}
    before, after = report.get("base_eval_loss"), report.get("eval_loss")
    if before is None or after is None:
        return None
    return {
        "kind": "good",
        "text": f"Evaluation loss {before:.4g} before training, {after:.4g} of the exported weights",
    }


def _tiles(run: RunValues) -> list[dict[str, str]]:
    report, method = run.report, run.recipe.get("objective", {}).get("method", "sft")
    sizes, units = sizes_of(method), units_of(method)
    last = run.evaluations[-1]["eval"] if run.evaluations else {}
    first = run.evaluations[0]["eval"] if run.evaluations and run.evaluations[0]["step"] == 0 else {}
    tiles = [
        (f"evaluation {name}", _number(value), f"{_number(first[name])} before training" if name in first else "last")
        for name, value in list(last.items())[:4]
    ]
    predicted = sum(report.get("predicted_bytes", {}).values())
    measured = sum(report.get("measured_bytes", {}).values())
    if measured:
        off = f"{(predicted - measured) / measured:+.1%}"
        tiles.append(("peak memory of the run", bytes_text(measured), f"predicted {bytes_text(predicted)} ({off})"))
    if report.get("tokens_per_second"):
        of_rows = f"{report['tokens']:,} {sizes}, {report['supervised_tokens']:,} {units}"
        tiles.append(("speed", f"{report['tokens_per_second']:,.0f} {sizes}/s", of_rows))
    if report.get("seconds"):
        seconds = sum(report["seconds"].values())
        tiles.append(("time", _duration(seconds), f"{_duration(report['seconds'].get('train', 0))} of it in steps"))
    if report.get("adapter_bytes"):
        share = report["adapter_bytes"] / max(report.get("base_bytes", 0), 1)
        tiles.append(("result", bytes_text(report["adapter_bytes"]), f"{share:.2%} of the base"))
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _evaluations(run: RunValues) -> dict[str, Any]:
    if not run.evaluations:
        return _section("Evaluations", text=["None: the recipe names no evaluation rows (data.eval)."])
    names = list(dict.fromkeys(name for record in run.evaluations for name in record["eval"]))
    shown = _few(run.evaluations, run.report.get("best_step"))
    rows = [[f"{record['step']:,}", *(record["eval"].get(name) for name in names)] for record in shown]
    kept = run.report.get("best_step") or run.report.get("final_step")
    best = next((at for at, record in enumerate(shown) if record["step"] == kept), -1)
    text = [f"The exported weights are those after step {kept:,}."] if kept else []
    tables, of_sources = [_table("", ["step", *names], rows, best)], shown[best].get("sources")
    if of_sources:
        tables.append(_table(f"By source, after step {shown[best]['step']:,}", *sources_table(of_sources)))
    return _section("Evaluations", text=text, tables=tables)


def _few(records: Sequence[dict[str, Any]], best: int | None, most: int = 30) -> list[dict[str, Any]]:
    """At most `most` and the best: the first, the last, and an even choice of the others."""
    stride = -(-len(records) // most)
    last = len(records) - 1
    return [record for at, record in enumerate(records) if at % stride == 0 or at == last or record["step"] == best]


def _classes(run: RunValues) -> list[dict[str, Any]]:
    facts = run.report.get("classes")
    if facts is None:
        return []
    tables = [_table("Each label", COLUMNS, [[line[name] for name in COLUMNS] for line in facts["per_class"]])]
    confusion = confusion_table(facts)
    if confusion is not None:
        tables.append(_table("Confusion", *confusion))
    return [_section("Labels", tables=tables)]


def _samples(run: RunValues) -> dict[str, Any] | None:
    """The answers to the first evaluation rows before training and at the end, beside the row's own."""
    found = [record for record in run.evaluations if record.get("samples")]
    if not found:
        return None
    first, last = found[0], found[-1]
    head = ["prompt", "the row's answer", *([] if first is last else [f"step {first['step']}"]), f"step {last['step']}"]
    lines = [
        [
            _end_of(at_end["prompt"]),
            at_end["reference"],
            *([] if first is last else [before["answer"]]),
            at_end["answer"],
        ]
        for before, at_end in zip(first["samples"], last["samples"], strict=False)
    ]
    return _section("Answers to the first evaluation rows", tables=[_table("", head, lines, texts=True)])


def _completions(run: RunValues) -> dict[str, Any] | None:
    """What the model wrote to the first prompts of some steps, the first and the last of those that are kept."""
    found = [record for record in run.steps if record.get("samples")]
    if not found:
        return None
    tables = []
    for record in dict.fromkeys((0, len(found) - 1)):
        samples = found[record]["samples"]
        names = list(samples[0]["rewards"])
        lines = [
            [
                each["prompt"],
                each["answer"],
                each["completion"] + ("" if each["ended"] else " […]"),
                *(each["rewards"][name] for name in names),
                each["advantage"],
            ]
            for each in samples
        ]
        head = ["prompt", "the row's answer", "completion", *names, "advantage"]
        tables.append(_table(f"Step {found[record]['step']:,}", head, lines, texts=True))
    return _section("Completions that the model learnt from", text=["[…]: it did not end."], tables=tables)


def _end_of(prompt: str) -> str:
    """The last words of a long prompt, after which the answer begins."""
    return prompt if len(prompt) <= MOST_CHARACTERS else f"[...] {prompt[-MOST_CHARACTERS:].partition(' ')[2]}"


def _worst_rows(run: RunValues) -> dict[str, Any] | None:
    """The evaluation rows with the highest loss a unit, what of them is learnt marked."""
    found = run.row_losses
    if not found.get("worst"):
        return None
    units = units_of(run.recipe.get("objective", {}).get("method", "sft"))
    lines = [_worst_row(found, **row) for row in found["worst"]]
    with_before = found["before"] is not None
    head = ["row", units, *(["loss before"] if with_before else []), "loss", "text, what is trained on marked"]
    text = [f"Of {len(found['rows']):,}, by their mean loss over {units}. Look here for wrong labels and odd formats."]
    return _section(
        "Evaluation rows with the highest loss", text=text, tables=[{**_table("", head, []), "rows": lines}]
    )


def _worst_row(found: dict[str, Any], number: int, text: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    units = found["units"][number]
    losses = [of_rows[number] for of_rows in (found["before"], found["losses"]) if of_rows is not None]
    means = [loss if loss is None else loss / max(units, 1) for loss in losses]
    return {"cells": [_number(cell) for cell in (found["rows"][number], units, *means)], "best": False, "text": text}


def _memory(run: RunValues) -> dict[str, Any] | None:
    peak = run.plan.get("peak_bytes")
    if not peak:
        return None
    total = peak["total"]
    measured = sum(run.report.get("measured_bytes", {}).values())
    sizes = {name: peak[name] for name in PARTS if peak.get(name)}
    rest = total - sum(sizes.values())
    if rest > 0:
        sizes[REST] = rest
    whole = max(total, measured)
    parts = [
        {
            "name": name,
            "value": bytes_text(size),
            "percent": f"{100 * size / whole:.2f}",
            "color": [*PARTS, REST].index(name),
        }
        for name, size in sizes.items()
    ]
    rows = [{"label": f"predicted {bytes_text(total)}", "parts": parts}]
    if measured:
        bar = {
            "name": "measured",
            "value": bytes_text(measured),
            "percent": f"{100 * measured / whole:.2f}",
            "color": 0,
        }
        rows.append({"label": f"measured {bytes_text(measured)}", "parts": [bar]})
    budget = run.plan.get("budget_bytes")
    text = [] if budget is None else [f"The budget was {bytes_text(budget)}."]
    return _section("Memory at the peak, by part", text=text, bars=[{"rows": rows, "key": parts}])


def _time(run: RunValues) -> dict[str, Any] | None:
    seconds = run.report.get("seconds")
    if not seconds:
        return None
    whole = sum(seconds.values())
    parts = [
        {"name": name, "value": _duration(value), "percent": f"{100 * value / whole:.2f}", "color": at % 6}
        for at, (name, value) in enumerate(seconds.items())
    ]
    return _section("Time", bars=[{"rows": [{"label": _duration(whole), "parts": parts}], "key": parts}])


def _rows(run: RunValues) -> dict[str, Any] | None:
    rows = run.plan.get("rows")
    if not rows:
        return None
    names = ("read", "trained", "dropped", "truncated", "longest_tokens", "tokens", "supervised_tokens")
    kinds = [("training", rows["training"]), ("evaluation", rows.get("evaluation"))]
    lines = [[kind, *(counts.get(name) for name in names)] for kind, counts in kinds if counts]
    reasons = [
        f"Dropped of the {kind} rows: {count:,} {reason}."
        for kind, counts in kinds
        if counts
        for reason, count in counts.get("dropped_reasons", {}).items()
    ]
    method = run.recipe.get("objective", {}).get("method", "sft")
    shown = {"tokens": sizes_of(method), "supervised_tokens": units_of(method), "longest_tokens": "longest"}
    head = ["rows", *(shown.get(name, name) for name in names)]
    return _section("Rows", text=[*reasons, *run.plan.get("notes", [])], tables=[_table("", head, lines)])


def _reactions(run: RunValues) -> dict[str, Any] | None:
    report = run.report
    text = []
    if report.get("skipped_steps"):
        text.append(f"{skipped_text(report['skipped_steps'])}.")
    if report.get("calibration"):
        text.append(f"{calibration_text(report['calibration']).capitalize()}.")
    found = report.get("reactions", [])
    if not found:
        return _section("Reactions", text=[*text, "None: every check passed."]) if report else None
    rows = [[item["probe"], item["action"], item["step"]] for item in found]
    return _section("Reactions", text=text, tables=[_table("", ["check", "what was done", "at step"], rows)])


def _sources(run: RunValues) -> dict[str, Any]:
    environment = json.dumps(
        {name: value for name, value in run.environment.items() if name != "fingerprint"}, indent=2, sort_keys=True
    )
    folds = [{"title": "recipe.yaml", "text": run.recipe_text, "open": False}]
    if run.environment:
        folds.append({"title": "Machine and versions", "text": environment, "open": False})
    return _section("Recipe and environment", folds=folds)
