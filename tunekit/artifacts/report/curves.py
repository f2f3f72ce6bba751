"""Records of steps and evaluations go in; the charts of a page come out as plain values.

A chart is {id, title, unit, log, series: [{label, x, y, kind: line | faint | dash | points, color}]}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from tunekit.artifacts.report.values import RunValues, sizes_counted

MOST_POINTS = 1000  # of one series: more cannot be told apart on a screen, and the page stays small
TREND_SHARE = 0.04  # of the steps: what the trend of a noisy series is a mean over
COLORS = 8
Values = Sequence[float | None]
LOGGED = ("epoch", "step", "tokens", "supervised_tokens", "seconds", "tokens_per_second", "peak_bytes")
CHARTS = {"loss": "Loss", "learning_rate": "Learning rate", "grad_norm": "Gradient norm before clipping"}


def charts_of(runs: Sequence[RunValues]) -> list[dict[str, Any]]:
    """The charts of one run, or of several over each other, each run in its colour."""
    many = len(runs) > 1
    charts = [_loss(runs, many)]
    names = dict.fromkeys(name for run in runs for record in run.evaluations for name in record["eval"])
    charts += [
        _chart(f"eval-{name}", f"Evaluation: {name}", [_points(run, name, at, many) for at, run in enumerate(runs)], "")
        for name in names
        if name not in ("loss", "perplexity")
    ]
    for name in ("learning_rate", "grad_norm"):
        charts.append(_chart(name, CHARTS[name], [_steps(run, name, at, many) for at, run in enumerate(runs)], ""))
    rate = f"{sizes_counted(runs)} per second"
    speed = [_trend(_steps(run, "tokens_per_second", at, many, rate)) for at, run in enumerate(runs)]
    charts.append(_chart("speed", f"{rate.capitalize()}, padding not counted", speed, ""))
    charts.append(_memory(runs, many))
    own = dict.fromkeys(name for run in runs for record in run.steps for name in record)
    for name in own:
        if name not in (*LOGGED, *CHARTS):
            series = [_trend(_steps(run, name, at, many)) for at, run in enumerate(runs)]
            charts.append(_chart(f"logged-{name}", f"Training: {name}", series, ""))
    return [chart for chart in charts if any(len(series["x"]) > 1 for series in chart["series"])]


def binned(runs: Iterable[RunValues]) -> int:
    """The most steps that one point stands for; 1 where every step is shown."""
    return max((-(-len(run.steps) // MOST_POINTS) for run in runs), default=1)


def _chart(name: str, title: str, series: list[dict[str, Any]], unit: str, log: bool = False) -> dict[str, Any]:
    return {"id": f"chart-{name}", "title": title, "unit": unit, "log": log, "series": series}


def _series(label: str, x: Values, y: Values, kind: str, color: int) -> dict[str, Any]:
    kept = [(a, _short(b)) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    return {"label": label, "x": [a for a, _ in kept], "y": [b for _, b in kept], "kind": kind, "color": color % COLORS}


def _short(value: float) -> float:
    """Five digits, which is more than a screen shows."""
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() else short


def _loss(runs: Sequence[RunValues], many: bool) -> dict[str, Any]:
    """The training loss, its trend, and the evaluations' loss; log scale where it falls tenfold."""
    series = []
    for at, run in enumerate(runs):
        every = _steps(run, "loss", at, many, "training")
        if not many:
            series.append({**every, "kind": "faint", "color": 0})
        series.append({**_trend(every), "label": run.name if many else "training, trend"})
        evaluated = _points(run, "loss", at if many else 1, many)
        series.append({**evaluated, "label": f"{run.name}, evaluation" if many else "evaluation"})
    shown = [value for one in series for value in one["y"]]
    log = bool(shown) and min(shown) > 0 and max(shown) > 10 * min(shown)
    return _chart("loss", "Loss" + (" (logarithmic)" if log else ""), [one for one in series if one["x"]], "", log)


def _steps(run: RunValues, name: str, at: int, many: bool, label: str | None = None) -> dict[str, Any]:
    """One value of every step, in at most MOST_POINTS means."""
    records = [record for record in run.steps if isinstance(record.get(name), int | float)]
    bins = min(MOST_POINTS, len(records))
    edges = [round(index * len(records) / bins) for index in range(bins + 1)] if bins else [0]
    x = [records[end - 1]["step"] for _, end in pairwise(edges)]
    y = [sum(record[name] for record in records[a:b]) / (b - a) for a, b in pairwise(edges)]
    return _series(run.name if many else label or name.replace("_", " "), x, y, "line", at)


def _trend(series: dict[str, Any]) -> dict[str, Any]:
    """Each value as the mean of those around it, as many on either side."""
    values = series["y"]
    half = int(len(values) * TREND_SHARE / 2)
    if not half:
        return series
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        means.append(_short((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return {**series, "y": means}


def _points(run: RunValues, name: str, color: int, many: bool) -> dict[str, Any]:
    records = [record for record in run.evaluations if isinstance(record["eval"].get(name), int | float)]
    x, y = [record["step"] for record in records], [record["eval"][name] for record in records]
    return _series(run.name if many else name, x, y, "points", color)


def _memory(runs: Sequence[RunValues], many: bool) -> dict[str, Any]:
    """The peak so far, as metrics.jsonl has it; of one run beside what was predicted."""
    series = [_steps(run, "peak_bytes", at, many, "peak so far") for at, run in enumerate(runs)]
    if not many and series[0]["x"]:
        predicted = runs[0].plan.get("peak_bytes", {}).get("total")
        if predicted is not None:
            x = series[0]["x"]
            ends = [x[0], x[-1]] if len(x) > 1 else x
            series.append(_series("predicted", ends, [predicted] * len(ends), "dash", 1))
    return _chart("memory", "Peak memory of the run", series, "bytes")
