"""The page of a sweep: the trials with their intervals, their values and metric as parallel coordinates, and their
curves."""

import math
from collections.abc import Iterator, Mapping, Sequence

from tunekit.artifacts.report.compare import number_text, outcome_table
from tunekit.artifacts.report.curves import COLORS, binned_text, charts_of
from tunekit.artifacts.report.paired import LEVEL
from tunekit.artifacts.report.sections import (
    AxisLine,
    ParallelAxes,
    ReportPage,
    ReportSection,
    ReportTable,
    Tone,
    ValueAxis,
)
from tunekit.artifacts.report.sweep_results import Setting, SweepResults
from tunekit.files.untrusted import printable

MOST_TICKS = 8  # values that an axis names
MOST_VALUE = 24  # characters of a value on an axis
MOST_FACTOR = 10.0  # a metric whose values differ by more has a logarithmic axis
BEST, UNCLEAR, OTHER = "best", "unclear", "other"
LABELS = {BEST: ", the best", UNCLEAR: ", cannot be distinguished from the best", OTHER: ""}


def sweep_page(
    results: SweepResults, values: Mapping[str, Mapping[str, object]], recipe: tuple[str, str]
) -> ReportPage:
    """Make the page of a sweep. `values`: for each setting, its values by dotted key; `recipe`: path and text of the
    recipe with the best setting."""
    trials = _count(sum(len(setting.runs) for setting in results.settings), "trial")
    size = f"{_count(len(results.settings), 'setting')} ({trials})" if results.several else trials
    sections = [*_trials(results), *_coordinates(results, values), *_curves(results), _runs(results), _next(*recipe)]
    tone: Tone = "good" if results.is_clear else "neutral"
    return ReportPage(f"Sweep of {size}", [], sections, results.verdict(), tone)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _trials(results: SweepResults) -> Iterator[ReportSection]:
    """The table, and below it the texts of failures, which would not fit into its cells."""
    name, noun = results.metric.removeprefix("eval "), "setting" if results.several else "trial"
    text = (
        f"{LEVEL:.0%} intervals of the difference from the best {noun} in {name}, on rows that both {noun}s evaluated. "
        "If an interval contains 0, the difference may be by chance."
    )
    over = f"The standard deviation (±) is that of the {name} over the {results.over} of a setting."
    head, lines = results.table()
    lines = [[_spaced(str(name)), *cells] for name, *cells in lines]
    texts = [text, over] if results.several else [text]
    yield ReportSection(f"{noun.capitalize()}s", texts, tables=[ReportTable(head, lines, best=0)])
    if results.failures:
        yield ReportSection(paragraphs=[f"{_spaced(run)} failed: {reason}" for run, reason in results.failures])


def _shown(results: SweepResults) -> list[Setting]:
    """The best settings that have evaluations. Each has its own colour in the charts, the colour of its index."""
    return [setting for setting in results.settings if any(run.evaluations for run in setting.runs)][:COLORS]


def _curves(results: SweepResults) -> Iterator[ReportSection]:
    """The section with charts. It shows one run of each of the best settings."""
    shown = _shown(results)
    runs = [next(run for run in setting.runs if run.evaluations) for setting in shown]
    texts = binned_text(runs)
    if len(shown) < len(results.settings):
        texts.append(f"The curves of the {len(shown)} best of {len(results.settings)} settings.")
    if results.several:
        texts.append(f"Only the first run of each setting is shown, not its other {results.over}.")
    if charts := charts_of(runs) if runs else []:
        yield ReportSection("Over the steps", texts, charts=charts)


def _runs(results: SweepResults) -> ReportSection:
    runs = [run for setting in results.settings for run in setting.runs if run.evaluations]
    outcome = outcome_table(runs)
    lines = [[_spaced(name), *cells] for name, *cells in outcome.texts()]
    text = "Values of the exported weights; if a run ended early, values of its last evaluation."
    return ReportSection("Runs", [text], tables=[ReportTable(["run", *outcome.labels], lines)])


def _spaced(name: str) -> str:
    """The name of a trial with spaces after commas, so that a narrow screen can wrap it."""
    return name.replace(",", ", ")


def _next(path: str, text: str) -> ReportSection:
    """The section that says how to continue with the best setting."""
    lines = ["The recipe with the values of the best setting:"]
    return ReportSection("Continue", lines, commands=[f"tunekit train {path}"], files=[(path, text)])


def _coordinates(results: SweepResults, values: Mapping[str, Mapping[str, object]]) -> Iterator[ReportSection]:
    """The section with parallel coordinates: an axis for each key that has several values, and an axis for the metric.
    Each finished setting is a line; the metric of other settings would be that of an earlier step."""
    settings = [setting for setting in results.settings if setting.numbers]
    keys = dict.fromkeys(key for setting in settings for key in values[setting.name])
    columns = {key: [values[setting.name].get(key) for setting in settings] for key in keys}
    placed = {key: _places(column) for key, column in columns.items() if len({*map(repr, column)}) > 1}
    if not placed:
        return
    axes = [ValueAxis(key.rpartition(".")[2].replace("_", " "), _ticks(ticks)) for key, ticks in placed.items()]
    metric, heights = _metric_axis(results, settings)
    colors = {setting.name: color for color, setting in enumerate(_shown(results))}
    lines = []
    for at, (setting, height) in enumerate(zip(settings, heights, strict=True)):
        points = [ticks[repr(columns[key][at])][1] for key, ticks in placed.items()]
        kind = BEST if setting is results.best else UNCLEAR if setting in results.unclear else OTHER
        label = f"{setting.name}: {results.metric} {number_text('', setting.mean)}{LABELS[kind]}"
        lines.append(AxisLine(label, [*points, height], kind, colors.get(setting.name)))
    texts = [
        "Each line is a setting, in the colour of its curves below. It crosses the axis of a key at its value; the "
        "values are evenly spaced. The best metric is at the top of the last axis. The best setting's line is thickest."
    ]
    if left := len(results.settings) - len(settings):
        texts.append(f"Only finished settings are drawn; {_count(left, 'setting')} did not finish.")
    drawn = ParallelAxes([*axes, metric], lines[::-1])  # the best one last, above the others
    yield ReportSection("Values and results", texts, axes=drawn)


def _places(column: Sequence[object]) -> dict[str, tuple[str, float]]:
    """The text of each value on an axis, and its height (0 to 1). Numbers are sorted; other values keep their order."""
    distinct = list({repr(value): value for value in column}.items())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for _, value in distinct):
        distinct.sort(key=lambda pair: float(str(pair[1])))
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for _, value in distinct]
    return {
        key: (printable(text, MOST_VALUE), at / (len(distinct) - 1) if len(distinct) > 1 else 0.5)
        for at, ((key, _), text) in enumerate(zip(distinct, texts, strict=True))
    }


def _ticks(places: Mapping[str, tuple[str, float]]) -> list[tuple[str, float]]:
    """The values that get a label on an axis: all values, or if there are many, only the first and the last."""
    ticks = list(places.values())
    return ticks if len(ticks) <= MOST_TICKS else [ticks[0], ticks[-1]]


def _metric_axis(results: SweepResults, settings: Sequence[Setting]) -> tuple[ValueAxis, list[float]]:
    """The axis of the metric, with the best value at the top; and the height of each setting on this axis."""
    numbers = [setting.mean for setting in settings if setting.mean is not None]
    low, high = min(numbers), max(numbers)
    log = low > 0 and high > MOST_FACTOR * low
    scale = math.log if log else float
    span = (scale(high) - scale(low)) or 1.0

    def height(value: float) -> float:
        share = (scale(value) - scale(low)) / span
        return share if results.higher else 1 - share

    ticks = [(number_text("", value), height(value)) for value in dict.fromkeys((low, high))]
    name = results.metric.removeprefix("eval ") + (" (logarithmic)" if log else "")
    return ValueAxis(name, ticks), [height(value) for value in numbers]
