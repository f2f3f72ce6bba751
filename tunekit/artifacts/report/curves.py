"""The charts of a page, made from the records of steps and evaluations."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from tunekit.artifacts.report.sections import Chart, Series
from tunekit.artifacts.report.values import RunValues, sizes_counted

MOST_POINTS = 1000  # maximum of points in a series; a screen cannot show more
TREND_SHARE = 0.04  # share of the steps over which the trend of a noisy series averages
COLORS = 8
LOGGED = ("epoch", "step", "tokens", "supervised_tokens", "seconds", "tokens_per_second", "peak_bytes")
CHARTS = {"loss": "Loss", "learning_rate": "Learning rate", "grad_norm": "Gradient norm before clipping"}


def charts_of(runs: Sequence[RunValues]) -> list[Chart]:
    """The charts of one run, or of several runs (one colour for each run). The chart of the most important metric comes
    first."""
    many = len(runs) > 1
    charts = [_loss(runs, many)]
    for name in dict.fromkeys(name for run in runs for record in run.evaluations for name in record.numbers("eval")):
        if name not in ("loss", "perplexity"):
            points = [_points(run, name, at, many) for at, run in enumerate(runs)]
            charts.append(Chart(f"chart-eval-{name}", f"Evaluation: {name}", "", False, points))
    for name in ("learning_rate", "grad_norm"):
        lines = [_steps(run, name, at, many) for at, run in enumerate(runs)]
        charts.append(Chart(f"chart-{name}", CHARTS[name], "", False, lines))
    rate = f"{sizes_counted(runs)} per second"
    speed = [_trend(_steps(run, "tokens_per_second", at, many, rate)) for at, run in enumerate(runs)]
    charts.append(Chart("chart-speed", f"{rate.capitalize()}, padding not counted", "", False, speed))
    charts.append(_memory(runs, many))
    for name in dict.fromkeys(name for run in runs for record in run.steps for name in record):
        if name not in (*LOGGED, *CHARTS):
            lines = [_trend(_steps(run, name, at, many)) for at, run in enumerate(runs)]
            charts.append(Chart(f"chart-logged-{name}", f"Training: {name}", "", False, lines))
    first = [f"chart-logged-{run.shows.headline.name}" for run in runs]
    charts.sort(key=lambda chart: chart.id not in first)
    return [chart for chart in charts if any(len(series.x) > 1 for series in chart.series)]


def binned_text(runs: Sequence[RunValues]) -> list[str]:
    """A sentence that says how many steps are averaged in each point of a curve; empty if each step has its own
    point."""
    most = max((-(-len(run.steps) // MOST_POINTS) for run in runs), default=1)
    return [f"Each point is the mean of up to {most} steps; metrics.jsonl contains every step."] if most > 1 else []


def _series(label: str, points: Sequence[tuple[float, float]], kind: str, color: int) -> Series:
    finite = [(x, _short(y)) for x, y in points if math.isfinite(y)]
    return Series(label, [x for x, _ in finite], [y for _, y in finite], kind, color % COLORS)


def _short(value: float) -> float:
    """The value rounded to five digits, because a screen cannot show more."""
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() else short


def _loss(runs: Sequence[RunValues], many: bool) -> Chart:
    """The chart of the training loss, its trend, and the evaluation loss. It has a logarithmic scale if the largest
    loss is more than ten times the smallest."""
    lines = []
    for at, run in enumerate(runs):
        steps = _steps(run, "loss", at, many, "training")
        if not many:
            lines.append(replace(steps, kind="faint", color=0))
        lines.append(replace(_trend(steps), label=run.name if many else "training, trend"))
        evaluated = _points(run, "loss", at if many else 1, many)
        lines.append(replace(evaluated, label=f"{run.name}, evaluation" if many else "evaluation"))
    shown = [value for series in lines for value in series.y]
    log = bool(shown) and min(shown) > 0 and max(shown) > 10 * min(shown)
    title = "Loss" + (" (logarithmic)" if log else "")
    return Chart("chart-loss", title, "", log, [series for series in lines if series.x])


def _steps(run: RunValues, name: str, at: int, many: bool, label: str | None = None) -> Series:
    """The curve of one logged value over the steps, averaged to at most MOST_POINTS points."""
    all_points = [(record.count("step"), value) for record in run.steps if (value := record.number(name)) is not None]
    bins = min(MOST_POINTS, len(all_points))
    edges = [round(index * len(all_points) / bins) for index in range(bins + 1)] if bins else [0]
    points = [
        (all_points[end - 1][0], sum(value for _, value in all_points[a:end]) / (end - a)) for a, end in pairwise(edges)
    ]
    return _series(run.name if many else label or name.replace("_", " "), points, "line", at)


def _trend(series: Series) -> Series:
    """A smoothed curve: each value is the mean of its neighbours, with equally many neighbours on each side."""
    half = int(len(series.y) * TREND_SHARE / 2)
    if not half:
        return series
    sums, means = list(accumulate(series.y, initial=0.0)), []
    for index in range(len(series.y)):
        reach = min(half, index, len(series.y) - 1 - index)
        means.append(_short((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return replace(series, y=means)


def _points(run: RunValues, name: str, color: int, many: bool) -> Series:
    values = [(record.count("step"), record.numbers("eval")) for record in run.evaluations]
    points = [(step, metrics[name]) for step, metrics in values if name in metrics]
    return _series(run.name if many else name, points, "points", color)


def _memory(runs: Sequence[RunValues], many: bool) -> Chart:
    """The chart of the peak memory until each step. For a single run, the chart also has the predicted peak."""
    lines = [_steps(run, "peak_bytes", at, many, "peak so far") for at, run in enumerate(runs)]
    predicted = runs[0].plan.part("peak_bytes").number("total")
    if not many and lines[0].x and predicted is not None:
        ends = dict.fromkeys((lines[0].x[0], lines[0].x[-1]))
        lines.append(_series("predicted", [(x, predicted) for x in ends], "dash", 1))
    return Chart("chart-memory", "Peak memory of the run", "bytes", False, lines)
