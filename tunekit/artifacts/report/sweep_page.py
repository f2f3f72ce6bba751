"""The page of a sweep: the trials with their intervals, their values and metric as parallel coordinates, and their
curves."""

import math
from collections.abc import Iterator, Mapping, Sequence

from tunekit.artifacts.report.compare import number_text, outcome_table
from tunekit.artifacts.report.curves import COLORS, binned_text, charts_of
from tunekit.artifacts.report.paired import LEVEL
from tunekit.artifacts.report.sections import AxisLine, ParallelAxes, ReportPage, ReportSection, ReportTable, ValueAxis
from tunekit.artifacts.report.sweep_results import Setting, SweepResults
from tunekit.artifacts.report.values import RunValues
from tunekit.files.untrusted import printable

MOST_TICKS = 8  # values that an axis names
MOST_VALUE = 24  # characters of a value on an axis
MOST_FACTOR = 10.0  # a metric whose values differ by more has a logarithmic axis
BEST, UNCLEAR, OTHER, NONE = "best", "unclear", "other", "none"


def sweep_page(
    results: SweepResults, values: Mapping[str, Mapping[str, object]], recipe: tuple[str, str]
) -> ReportPage:
    """Make the page of a sweep. `values`: for each setting, its values by dotted key; `recipe`: path and text of the
    recipe with the best setting."""
    count = sum(len(setting.runs) for setting in results.settings)
    sections = [_trials(results), *_coordinates(results, values), *_curves(results), _runs(results), _next(*recipe)]
    return ReportPage(f"Sweep of {count} trials", [], sections, results.verdict())


def _trials(results: SweepResults) -> ReportSection:
    name = results.metric.removeprefix("eval ")
    text = (
        f"{LEVEL:.0%} intervals of the difference from the best trial in {name}, on rows that both trials evaluated. "
        "If an interval contains 0, the difference may be by chance."
    )
    head, lines = results.table()
    lines = [[_spaced(str(name)), *cells] for name, *cells in lines]
    return ReportSection("Trials", [text], tables=[ReportTable(head, lines, best=0)])


def _curves(results: SweepResults) -> Iterator[ReportSection]:
    """The section with charts. It shows one run of each of the best settings, so that each setting has its own
    colour."""
    shown = [setting for setting in results.settings if any(run.evaluations for run in setting.runs)][:COLORS]
    runs = [next(run for run in setting.runs if run.evaluations) for setting in shown]
    several = max(len(setting.runs) for setting in results.settings) > 1
    texts = binned_text(runs)
    if len(shown) < len(results.settings):
        texts.append(f"The curves of the {len(shown)} best of {len(results.settings)} settings.")
    if several:
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
    Each setting is a line."""
    keys = dict.fromkeys(key for setting in results.settings for key in values[setting.name])
    columns = {key: [values[setting.name].get(key) for setting in results.settings] for key in keys}
    placed = {key: _places(column) for key, column in columns.items() if len({*map(repr, column)}) > 1}
    if not placed or len(results.settings) < 2:
        return
    axes = [ValueAxis(key.rpartition(".")[2].replace("_", " "), _ticks(ticks)) for key, ticks in placed.items()]
    metric, heights = _metric_axis(results)
    lines = []
    for at, (setting, height) in enumerate(zip(results.settings, heights, strict=True)):
        points = [ticks[repr(columns[key][at])][1] for key, ticks in placed.items()]
        lines.append(AxisLine(_label(results, setting), [*points, height], _kind(results, setting)))
    text = "Each line is a setting and crosses each axis at its value; the best metric is at the top of the last axis."
    drawn = ParallelAxes([*axes, metric], lines[::-1])  # the best one last, above the others
    yield ReportSection("Values and results", [text], axes=drawn)


def _label(results: SweepResults, setting: Setting) -> str:
    return f"{setting.name}: {results.metric} {number_text('', setting.mean)}"


def _kind(results: SweepResults, setting: Setting) -> str:
    if setting.mean is None:
        return NONE
    return BEST if setting is results.best else UNCLEAR if setting in results.unclear else OTHER


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


def _metric_axis(results: SweepResults) -> tuple[ValueAxis, list[float]]:
    """The axis of the metric, with the best value at the top; and the height of each setting on this axis."""
    measured = [_last(results, setting) for setting in results.settings]
    numbers = [value for value in measured if value is not None and math.isfinite(value)]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    log = low > 0 and high > MOST_FACTOR * low
    scale = math.log if log else float
    span = (scale(high) - scale(low)) or 1.0

    def height(value: float | None) -> float:
        if value is None or not math.isfinite(value):
            return 0.0
        share = (scale(value) - scale(low)) / span
        return share if results.higher else 1 - share

    ticks = [(number_text("", value), height(value)) for value in dict.fromkeys((low, high))]
    name = results.metric.removeprefix("eval ") + (" (logarithmic)" if log else "")
    return ValueAxis(name, ticks), [height(value) for value in measured]


def _last(results: SweepResults, setting: Setting) -> float | None:
    """The mean metric of a setting. If none of its runs is finished, the mean over the last evaluations of its runs."""
    if setting.mean is not None:
        return setting.mean
    name = results.by.removeprefix("eval.")
    last = [value for run in setting.runs if (value := _last_value(run, name)) is not None]
    return sum(last) / len(last) if last else None


def _last_value(run: RunValues, name: str) -> float | None:
    return run.exported.numbers("eval").get(name)
