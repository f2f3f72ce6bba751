"""What the report of one run contains: sections made from the plain values of its run folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields

from tunekit.artifacts.report.curves import binned_text, charts_of
from tunekit.artifacts.report.pictures import before_and_after
from tunekit.artifacts.report.sections import Bar, MarkedText, ReportPage, ReportSection, ReportTable, Tile
from tunekit.artifacts.report.values import EvaluationValues, RowLossValues, RunValues
from tunekit.artifacts.run import PICTURES
from tunekit.console.text import cell_text
from tunekit.metrics.classes import COLUMNS, confusion_table
from tunekit.metrics.sources import sources_table
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.records import Panel, PeakBytes, bytes_text, calibration_text, skipped_text

MOST_CHARACTERS = 240  # of a prompt above its answers
MOST_EVALUATIONS, MOST_LABELS = 12, 20
PEAK = (
    "The peak, here, in the plan and in the line of progress, is the most that the run takes: on a GPU what its "
    "tensors are given; on a CPU what the process takes beyond Python and its libraries. It was predicted before a "
    "weight was loaded."
)
REST = "the process and what its allocator keeps"
SECONDS_ORDER = ("load", "data", "calibrate", "try", "sample", "reward", "train", "evaluate", "save")
ROW_NAMES = ("read", "trained", "dropped", "truncated", "longest_tokens", "tokens", "supervised_tokens")


def run_report(run: RunValues) -> ReportPage:
    """The report of a run, finished or not."""
    sections = [section for build in SECTIONS for section in build(run)]
    return ReportPage(run.name, _intro(run), sections, _verdict(run), bool(run.report.get("verdict")))


def _intro(run: RunValues) -> list[str]:
    plan, model, adapter = run.plan, run.plan.get("model", {}), run.section("adapter")
    rank = f" of rank {adapter['r']}" if adapter.get("r") else ""
    weights = "" if model.get("quantization", "none") == "none" else f", weights in {model['quantization']}"
    method = run.section("objective").get("method")
    objective = "" if method is None else f" Objective: {method}."
    trained, total = plan.get("trainable_parameters", 0), plan.get("total_parameters", 0)
    targets, done = plan.get("targets"), len(run.steps)
    modules = f" in {len(targets):,} modules" if targets else ""
    per_epoch = plan.get("rows", {}).get("steps_per_epoch")
    epochs = f" ({done / per_epoch:.2f} epochs)" if per_epoch else ""
    return [
        f"{adapter.get('method')}{rank} on {model.get('name_or_path')} ({model.get('model_type')}, "
        f"computed in {model.get('dtype')}{weights}) on {plan.get('device')}.{objective}",
        f"{trained:,} of {total:,} parameters ({trained / max(total, 1):.2%}){modules} were trained "
        f"for {done:,} of {plan.get('steps', 0):,} steps{epochs}. State: {run.state}.",
    ]


def _verdict(run: RunValues) -> str:
    before, after = run.report.get("base_eval_loss"), run.report.get("eval_loss")
    if "verdict" in run.report:
        return f"{run.report['verdict'].capitalize()}."
    if before is None or after is None:
        return ""
    return f"Evaluation loss {before:.4g} before training, {after:.4g} of the exported weights."


def _overview(run: RunValues) -> Iterator[ReportSection]:
    """The most important numbers as tiles."""
    report, shows = run.report, run.shows
    last = run.evaluations[-1]["eval"] if run.evaluations else {}
    first = run.evaluations[0]["eval"] if run.evaluations and run.evaluations[0]["step"] == 0 else {}
    tiles = []
    for name, value in list(last.items())[:4]:
        note = f"{cell_text(first[name])} before training" if name in first else "last"
        tiles.append(Tile(f"evaluation {name}", cell_text(value), note))
    predicted, measured = (sum(sizes.values()) for sizes in _peaks(run))
    if measured:
        note = f"predicted {bytes_text(predicted)} ({_difference(predicted, measured)})"
        tiles.append(Tile("peak memory of the run", bytes_text(measured), note))
    if report.get("tokens_per_second"):
        counts = f"{report['tokens']:,} {shows.sizes}, {report['supervised_tokens']:,} {shows.units}"
        tiles.append(Tile("speed", f"{report['tokens_per_second']:,.0f} {shows.sizes}/s", counts))
    if report.get("seconds"):
        seconds = report["seconds"]
        note = f"{duration_text(seconds.get('train', 0))} of it in steps"
        tiles.append(Tile("time", duration_text(sum(seconds.values())), note))
    if report.get("adapter_bytes"):
        share = report["adapter_bytes"] / max(report.get("base_bytes", 0), 1)
        tiles.append(Tile("result", bytes_text(report["adapter_bytes"]), f"{share:.2%} of the base"))
    if tiles:
        yield ReportSection(tiles=tiles)


def _peaks(run: RunValues) -> tuple[dict[str, int], dict[str, int]]:
    """The predicted and the measured peak of each device."""
    return run.report.get("predicted_bytes", {}), run.report.get("measured_bytes", {})


def _difference(predicted: float, measured: float) -> str:
    return f"{(predicted - measured) / measured:+.1%}" if measured else ""


def duration_text(seconds: float) -> str:
    """A duration as a person reads it: 4.2 s, 2 min 36 s, 1 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"


def _curves(run: RunValues) -> Iterator[ReportSection]:
    """The headline's change over the run, and all curves."""
    headline, charts = run.shows.headline, charts_of([run])
    first, final = (run.report.get(f"{which}_{headline.name}") for which in ("first", "final"))
    paragraphs, warnings = [], []
    if isinstance(first, int | float) and isinstance(final, int | float):
        means = f"{first:.4g} over the first tenth of the steps, {final:.4g} over the last"
        paragraphs.append(f"{headline.title}: {means}.")
        if len(run.steps) > 2 and (final <= first if headline.rises else final >= first):
            warnings.append(f"It did not {'rise' if headline.rises else 'fall'}.")
    if paragraphs or charts:
        yield ReportSection("Over the steps", [*paragraphs, *binned_text([run])], warnings, charts=charts)


def _result(run: RunValues) -> Iterator[ReportSection]:
    """The evaluations."""
    best, exported = run.report.get("best_step"), run.report.get("best_step", run.report.get("final_step"))
    why = "the last" if best is None else "the best evaluation"
    text = [] if exported is None else [f"The exported weights are those after step {exported:,}, {why}."]
    if not run.evaluations:
        none = "The result was not compared with its base: there are no evaluation rows (data.eval)."
        yield ReportSection("Result", [none if run.report else "Nothing has been evaluated yet.", *text])
        return
    names = sorted(dict.fromkeys(name for record in run.evaluations for name in record["eval"]), key="loss".__ne__)
    shown = _few(run.evaluations, best)
    rows = [[_step_label(record["step"], best), *map(record["eval"].get, names)] for record in shown]
    marked = next((at for at, record in enumerate(shown) if record["step"] == exported), -1)
    tables = [ReportTable(["evaluation at step", *names], rows, best=marked)]
    if shown[marked].get("sources"):
        head, lines = sources_table(shown[marked]["sources"])
        tables.append(ReportTable(head, lines, f"By source, after step {shown[marked]['step']:,}"))
    yield ReportSection("Result", text, tables=tables)


def _few(records: Sequence[EvaluationValues], best: int | None) -> list[EvaluationValues]:
    """About MOST_EVALUATIONS: the first, the last, the best, and an even choice of the others."""
    stride, last = -(-len(records) // MOST_EVALUATIONS), len(records) - 1
    return [record for at, record in enumerate(records) if at % stride == 0 or at == last or record["step"] == best]


def _step_label(step: int, best: int | None) -> str:
    return f"{step:,}" + (" (best)" if step == best else " (before training)" if step == 0 else "")


def _labels(run: RunValues) -> Iterator[ReportSection]:
    """Each label's line, before it the worst ones if there are many, and the confusion of few."""
    facts = run.report.get("classes")
    if facts is None:
        return
    lines = [[line[name] for name in COLUMNS] for line in facts["per_class"]]
    tables = [ReportTable(COLUMNS, lines, "Each label, of the exported weights")]
    if len(lines) > MOST_LABELS:
        worst = sorted(facts["per_class"], key=lambda line: line["f1"])[:MOST_LABELS]
        shown = [line for line, values in zip(lines, facts["per_class"], strict=True) if values in worst]
        tables.insert(0, ReportTable(COLUMNS, shown, f"The {len(shown)} labels of lowest F1"))
    confusion = confusion_table(facts)
    if confusion is not None:
        tables.append(ReportTable(*confusion, "Confusion"))
    yield ReportSection("Labels", tables=tables)


def _pictures(run: RunValues) -> Iterator[ReportSection]:
    """Pictures of the validation prompts before training and with the exported weights."""
    prompts = run.section("objective").get(run.shows.draws) or ()
    rows = before_and_after(run.path, prompts, run.exported_step) if isinstance(prompts, list) else []
    if rows:
        text = f"Always from the same noise. Those of every evaluation are in {PICTURES}/, as they were drawn."
        yield ReportSection("Images", [text], pictures=rows)


def _answers(run: RunValues) -> Iterator[ReportSection]:
    """The answers to the first evaluation rows before training and at the end, next to the row's own."""
    records = [record for record in run.evaluations if record.get("samples")]
    if not records:
        return
    shown = records[:1] if len(records) == 1 else [records[0], records[-1]]
    head = ["prompt", "the row's answer", *(f"step {record['step']}" for record in shown)]
    rows = [
        [_end_of(row[0]["prompt"]), row[-1]["reference"], *(sample["answer"] for sample in row)]
        for row in zip(*(record["samples"] for record in shown), strict=False)
    ]
    yield ReportSection("Answers to the first evaluation rows", tables=[ReportTable(head, rows, has_texts=True)])


def _end_of(prompt: str) -> str:
    """The last words of a long prompt, after which the answer begins."""
    return prompt if len(prompt) <= MOST_CHARACTERS else f"[...] {prompt[-MOST_CHARACTERS:].partition(' ')[2]}"


def _panels(run: RunValues) -> Iterator[ReportSection]:
    """The objective's own panels: the examples of the first and of the last step that recorded some."""
    for panel in run.shows.panels:
        found = [(record["step"], examples) for record in run.steps if (examples := record.get(panel.key))]
        tables = [
            _panel_table(panel, f"Step {step:,}", examples)
            for step, examples in (found if len(found) < 2 else (found[0], found[-1]))
            if isinstance(examples, list)
        ]
        if tables:
            yield ReportSection(panel.title, tables=tables)


def _panel_table(panel: Panel, title: str, examples: Sequence[dict[str, object]]) -> ReportTable:
    first, columns = examples[0], list[tuple[str, str, str | None]]()  # label, key, name in a mapping
    for label, key in panel.columns:
        value = first.get(key)
        columns += [(name, key, name) for name in value] if isinstance(value, dict) else [(label, key, None)]
    rows = [
        [value.get(name) if isinstance(value := each.get(key), dict) else value for _, key, name in columns]
        for each in examples
    ]
    return ReportTable([label for label, _, _ in columns], rows, title, has_texts=True)


def _worst_rows(run: RunValues) -> Iterator[ReportSection]:
    """The evaluation rows with the highest loss per unit; what is learned of them is marked."""
    kept, units = run.row_losses, run.shows.units
    if not kept.get("worst"):
        return
    before = kept["before"] is not None
    head = ["row", units, *(["loss before"] if before else []), "loss", "text, what is trained on marked"]
    rows = [[*_row_losses(kept, row["number"]), MarkedText(row["text"])] for row in kept["worst"]]
    text = f"Of {len(kept['rows']):,}, by their mean loss over {units}. Look here for wrong labels and odd formats."
    yield ReportSection("Evaluation rows with the highest loss", [text], tables=[ReportTable(head, rows)])


def _row_losses(kept: RowLossValues, number: int) -> list[object]:
    """The row's origin, its units, and its mean loss before training, where it is known, and after."""
    units = kept["units"][number]
    losses = [values[number] for values in (kept["before"], kept["losses"]) if values is not None]
    return [kept["rows"][number], units, *(loss if loss is None else loss / max(units, 1) for loss in losses)]


def _memory(run: RunValues) -> Iterator[ReportSection]:
    """The predicted peak by part, next to what was measured."""
    peak, report = run.plan.get("peak_bytes"), run.report
    if not peak:
        return
    sizes = {part.name: peak[part.name] for part in fields(PeakBytes) if part.name != "total" and peak.get(part.name)}
    sizes |= {REST: rest} if (rest := peak["total"] - sum(sizes.values())) > 0 else {}
    parts = [(name, size, bytes_text(size)) for name, size in sizes.items()]
    bars = [Bar(f"predicted {bytes_text(peak['total'])}", parts)]
    predicted, measured = _peaks(run)
    if total := sum(measured.values()):
        bars.append(Bar(f"measured {bytes_text(total)}", [("measured", total, bytes_text(total))]))
    compared = [
        [device, bytes_text(predicted[device]), bytes_text(size), _difference(predicted[device], size)]
        for device, size in sorted(measured.items())
        if device in predicted
    ]
    peaks = [
        ("asked for by tensors on the device", report.get("peak_requested_bytes")),
        ("allocated to them: the peak", report.get("peak_allocated_bytes")),
        ("reserved from the device by PyTorch", report.get("peak_reserved_bytes")),
        ("the whole process on the host, Python and its libraries included", report.get("peak_host_bytes")),
    ]
    highest = [[name, bytes_text(size)] for name, size in peaks if size is not None]
    tables = [
        ReportTable(["device", "predicted peak", "measured peak", "prediction against measurement"], compared),
        ReportTable(["at its highest", "bytes"], highest),
    ]
    kept, exceeded = _budget(run.plan.get("budget_bytes"), max(measured.values(), default=0))
    yield ReportSection("Memory", [PEAK, *kept], exceeded, bars=bars, tables=[table for table in tables if table.rows])


def _budget(budget: int | None, measured: int) -> tuple[list[str], list[str]]:
    """That the budget was kept, by measurement, or that it was exceeded."""
    if budget is None:
        return [], []
    if not measured:
        return [f"The budget was {bytes_text(budget)}."], []
    if measured <= budget:
        return [f"The budget of {bytes_text(budget)} was kept: {bytes_text(budget - measured)} of it was left."], []
    return [], [f"The budget of {bytes_text(budget)} was exceeded by {bytes_text(measured - budget)}."]


def _speed(run: RunValues) -> Iterator[ReportSection]:
    """Rates, time by part, and the pass over the data before step 1."""
    report, sizes, units = run.report, run.shows.sizes, run.shows.units
    if "tokens" not in report:
        return
    rates = [(sizes, report.get("tokens_per_second")), (units, report.get("supervised_tokens_per_second"))]
    rows = [[f"{name} per second", f"{value:,.0f}"] for name, value in rates if value is not None]
    text = [f"{report['tokens']:,} {sizes} were seen, with {report['supervised_tokens']:,} {units}."]
    if rows:
        text.append(
            f"{sizes.capitalize()} are those of the rows, padding never counted; the loss is taken over the {units}. "
            "The time is that spent in optimizer steps; loading, evaluation and saving are not in it."
        )
    if "calibration" in report:
        text.append(f"{calibration_text(report['calibration']).capitalize()}.")
    seconds = sorted(report.get("seconds", {}).items(), key=lambda item: _place(item[0]))
    parts = [(name, value, duration_text(value)) for name, value in seconds]
    bars = [Bar(f"time {duration_text(sum(size for _, size, _ in parts))}", parts)] if parts else []
    yield ReportSection("Speed", text, bars=bars, tables=[ReportTable(["rate", "value"], rows)] if rows else [])


def _place(part: str) -> int:
    return SECONDS_ORDER.index(part) if part in SECONDS_ORDER else len(SECONDS_ORDER)


def _rows(run: RunValues) -> Iterator[ReportSection]:
    """What became of the rows of the sources."""
    rows, shows = run.plan.get("rows"), run.shows
    if not rows:
        return
    both = {"training": rows.get("training"), "evaluation": rows.get("evaluation")}
    kinds = [(kind, counts) for kind, counts in both.items() if counts]
    shown = {"tokens": shows.sizes, "supervised_tokens": shows.units, "longest_tokens": "longest"}
    lines = [[shown.get(name, name), *(counts.get(name) for _, counts in kinds)] for name in ROW_NAMES]
    text = [
        f"Dropped of the {kind} rows: {count:,} {reason}."
        for kind, counts in kinds
        for reason, count in sorted(counts.get("dropped_reasons", {}).items())
    ]
    if run.plan.get("text") is not None:
        text.append(f"Packing: {'on' if rows.get('packing') else 'off'} ({rows.get('packing_reason')}).")
    table = ReportTable(["rows", *(kind for kind, _ in kinds)], lines)
    yield ReportSection("Rows", [*text, *run.plan.get("notes", [])], tables=[table])


def _size(run: RunValues) -> Iterator[ReportSection]:
    """The result's size on disk."""
    size, base = run.report.get("adapter_bytes"), run.report.get("base_bytes")
    if size is not None:
        share = f", {size / base:.2%} of the base's {bytes_text(base)}" if base else ""
        yield ReportSection("Size", [f"The result takes {bytes_text(size)} on disk{share}."])


def _reactions(run: RunValues) -> Iterator[ReportSection]:
    """What acted during the run."""
    if not run.report:
        return
    skipped, reactions = run.report.get("skipped_steps"), run.report.get("reactions", [])
    text = [f"{skipped_text(skipped)}."] if skipped else []
    if not reactions:
        text.append("None: every check at the start passed, and the run did what its plan said.")
    rows = [[item["probe"], item["action"], item["step"]] for item in reactions]
    tables = [ReportTable(["check", "what was done", "at step"], rows)] if rows else []
    yield ReportSection("Reactions", text, tables=tables)


def _use(run: RunValues) -> Iterator[ReportSection]:
    """The commands that come next."""
    if not run.report:
        return
    place = os.path.relpath(run.path)
    place = shlex.quote(str(run.path) if place.startswith("..") else place)
    method = run.section("adapter").get("method")
    known = method in known_names("adapters")
    full = known and getattr(settings_class("adapters", str(method)), "trains_base", False)
    commands, text = [f"tunekit eval {place}", f"tunekit generate {place} --prompt 'your text'"], []
    if not full:
        commands.append(f"tunekit merge {place}/adapter --output {place}/merged")
    if run.shows.draws:
        text = ['A LoRA in adapter/ is diffusers\' too: pipeline.load_lora_weights("adapter") loads it.']
    elif not full:
        text = ['adapter/ is in PEFT\'s format: PeftModel.from_pretrained(base, "adapter") loads it too.']
    yield ReportSection("Use it", text, commands=commands)


def _files(run: RunValues) -> Iterator[ReportSection]:
    """The recipe and the machine."""
    shown = {name: value for name, value in run.environment.items() if name != "fingerprint"}
    environment = json.dumps(shown, indent=2, sort_keys=True) if shown else ""
    files = [("recipe.yaml", run.recipe_text), ("Machine and versions", environment)]
    yield ReportSection("Recipe and environment", files=[(name, text) for name, text in files if text])


SECTIONS = (
    _overview,
    _curves,
    _result,
    _labels,
    _pictures,
    _answers,
    _panels,
    _worst_rows,
    _memory,
    _speed,
    _rows,
    _size,
    _reactions,
    _use,
    _files,
)
