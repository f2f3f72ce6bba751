"""The sections of a run's report about memory, time, rows and size. Also the tiles with the most important numbers."""

from collections.abc import Iterator
from dataclasses import fields

from tunekit.artifacts.report.sections import Bar, ReportSection, ReportTable
from tunekit.artifacts.report.values import RunValues
from tunekit.console.progress import RATE_STEPS, seconds_left
from tunekit.console.text import cell_text
from tunekit.records import PeakBytes, bytes_text, calibration_text

PEAK = (
    "The peak in this report, in the plan and in the progress line is the maximum memory of the run. On a GPU this is "
    "the memory allocated to tensors; on a CPU, the memory of the process without Python and its libraries. It was "
    "predicted before any weights were loaded."
)
REST = "the process, and freed memory that its allocator keeps"
PEAKS = {
    "peak_requested_bytes": "requested by tensors on the device",
    "peak_allocated_bytes": "allocated to tensors on the device (the peak)",
    "peak_reserved_bytes": "reserved from the device by PyTorch",
    "peak_host_bytes": "the whole process on the host, including Python and its libraries",
}
SECONDS_ORDER = ("load", "data", "calibrate", "try", "sample", "reward", "train", "evaluate", "save", "export", "tasks")
ROW_NAMES = ("read", "trained", "dropped", "truncated", "longest_tokens", "tokens", "supervised_tokens")


def overview(run: RunValues) -> Iterator[ReportSection]:
    """The most important numbers of a run, as tiles for the top of the page."""
    report, shows, tiles = run.report, run.shows, list[tuple[str, str, str]]()
    result = run.exported.numbers("eval")
    first = run.evaluations[0].numbers("eval") if run.evaluations and run.evaluations[0]["step"] == 0 else {}
    for name, value in list(result.items())[:4]:
        note = f"{cell_text(first[name])} before training" if name in first else f"after step {run.exported_step:,}"
        tiles.append((f"evaluation {name}", cell_text(value), note))
    predicted, measured = (sum(report.numbers(name).values()) for name in ("predicted_bytes", "measured_bytes"))
    if measured:
        note = f"predicted {bytes_text(predicted)} ({_difference(predicted, measured)})"
        tiles.append(("peak memory of the run", bytes_text(measured), note))
    if rate := report.number("tokens_per_second"):
        counts = f"{report.count('tokens'):,} {shows.sizes}, {report.count('supervised_tokens'):,} {shows.units}"
        tiles.append(("speed", f"{rate:,.0f} {shows.sizes}/s", counts))
    pace = [spent for step in run.steps[-RATE_STEPS:] if (spent := step.number("seconds")) is not None]
    left = seconds_left(pace, run.plan.count("steps") - len(run.steps))
    if left is not None and run.state == "running":
        tiles.append(("time left", duration_text(left), f"at the pace of the last {len(pace):,} steps"))
    if seconds := report.numbers("seconds"):
        note = f"{duration_text(seconds.get('train', 0))} of this in training steps"
        tiles.append(("time", duration_text(sum(seconds.values())), note))
    if written := report.number("adapter_bytes"):
        share = written / max(report.count("base_bytes"), 1)
        tiles.append(("result", bytes_text(written), f"{share:.2%} of the base"))
    if tiles:
        yield ReportSection(tiles=tiles)


def _difference(predicted: float, measured: float) -> str:
    return f"{(predicted - measured) / measured:+.1%}" if measured else ""


def duration_text(seconds: float) -> str:
    """A duration in readable form: 4.2 s, 2 min 36 s, 1 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"


def memory(run: RunValues) -> Iterator[ReportSection]:
    """The section that compares the predicted peak and its parts with the measured peak."""
    peak, report = run.plan.numbers("peak_bytes"), run.report
    if not peak:
        return
    sizes = {part.name: peak[part.name] for part in fields(PeakBytes) if part.name != "total" and peak.get(part.name)}
    sizes |= {REST: rest} if (rest := peak["total"] - sum(sizes.values())) > 0 else {}
    parts = [(name, size, bytes_text(size)) for name, size in sizes.items()]
    bars = [Bar(f"predicted {bytes_text(peak['total'])}", parts)]
    predicted, measured = report.numbers("predicted_bytes"), report.numbers("measured_bytes")
    if total := sum(measured.values()):
        bars.append(Bar(f"measured {bytes_text(total)}", [("measured", total, bytes_text(total))]))
    compared = [
        [device, bytes_text(predicted[device]), bytes_text(size), _difference(predicted[device], size)]
        for device, size in sorted(measured.items())
        if device in predicted
    ]
    highest = [[text, bytes_text(size)] for name, text in PEAKS.items() if (size := report.number(name)) is not None]
    tables = [
        ReportTable(["device", "predicted peak", "measured peak", "prediction against measurement"], compared),
        ReportTable(["at its highest", "bytes"], highest),
    ]
    facts, exceeded = _budget(run.plan.number("budget_bytes"), max(measured.values(), default=0))
    if share := report.number("base_bytes_of_rank"):
        facts.append(f"Each rank stored {bytes_text(share)} of the base.")
    yield ReportSection("Memory", [PEAK, *facts], exceeded, bars=bars, tables=[table for table in tables if table.rows])


def _budget(budget: float | None, measured: float) -> tuple[list[str], list[str]]:
    """Sentences about the memory budget, as two lists: facts, and a warning if the peak exceeded the budget."""
    if budget is None:
        return [], []
    if not measured:
        return [f"The budget was {bytes_text(budget)}."], []
    if measured <= budget:
        return [f"The budget of {bytes_text(budget)} was kept: {bytes_text(budget - measured)} of it was left."], []
    return [], [f"The budget of {bytes_text(budget)} was exceeded by {bytes_text(measured - budget)}."]


def speed(run: RunValues) -> Iterator[ReportSection]:
    """The section about speed: tokens per second, and the time that each activity took."""
    report, sizes, units = run.report, run.shows.sizes, run.shows.units
    if "tokens" not in report:
        return
    rates = [(sizes, report.number("tokens_per_second")), (units, report.number("supervised_tokens_per_second"))]
    lines = [[f"{name} per second", f"{value:,.0f}"] for name, value in rates if value is not None]
    text = [f"{report.count('tokens'):,} {sizes} were seen, with {report.count('supervised_tokens'):,} {units}."]
    if lines:
        text.append(
            f"{sizes.capitalize()} are counted without padding; the loss is computed over the {units}. The "
            "rates count only the time of optimizer steps, without loading, evaluation and saving."
        )
    if calibration := report.part("calibration"):
        text.append(f"{calibration_text(calibration).capitalize()}.")
    seconds = report.numbers("seconds")
    names = sorted(seconds, key=lambda name: SECONDS_ORDER.index(name) if name in SECONDS_ORDER else len(SECONDS_ORDER))
    parts = [(name, seconds[name], duration_text(seconds[name])) for name in names]
    bars = [Bar(f"time {duration_text(sum(seconds.values()))}", parts)] if parts else []
    tables = [ReportTable(["rate", "value"], lines)] if lines else []
    if starts := report.parts("starts"):
        steps = [f"{start.count('first_step'):,} to {start.count('last_step'):,}" for start in starts]
        minutes = [f"{start.number('minutes') or 0.0:.1f}" for start in starts]
        pairs = [[step, text] for step, text in zip(steps, minutes, strict=True)]
        tables.append(
            ReportTable(["steps of each start", "minutes (of a killed one: up to its last checkpoint)"], pairs)
        )
    yield ReportSection("Speed", text, bars=bars, tables=tables)


def rows(run: RunValues) -> Iterator[ReportSection]:
    """The section about rows: how many rows of the sources were used for training, dropped and truncated, and why."""
    planned, shows = run.plan.part("rows"), run.shows
    if not planned:
        return
    kinds = {kind: counts for kind in ("training", "evaluation") if (counts := planned.part(kind))}
    shown = {"tokens": shows.sizes, "supervised_tokens": shows.units, "longest_tokens": "longest"}
    lines = [[shown.get(name, name), *(counts.get(name) for counts in kinds.values())] for name in ROW_NAMES]
    text = [
        f"{count:,} {kind} rows were dropped: {reason}."
        for kind, counts in kinds.items()
        for reason, count in sorted(counts.numbers("dropped_reasons").items())
    ]
    if run.plan.get("text") is not None:
        text.append(f"Packing: {'on' if planned.get('packing') else 'off'} ({planned.get('packing_reason')}).")
    text += map(str, run.plan.items_of("notes"))
    yield ReportSection("Rows", text, tables=[ReportTable(["rows", *kinds], lines)])


def size(run: RunValues) -> Iterator[ReportSection]:
    """The result's size on disk."""
    result, base = run.report.number("adapter_bytes"), run.report.number("base_bytes")
    if result is not None:
        share = f", {result / base:.2%} of the base's {bytes_text(base)}" if base else ""
        yield ReportSection("Size", [f"The result takes {bytes_text(result)} on disk{share}."])
