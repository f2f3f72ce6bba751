"""The results of a sweep: the settings in order of their metric, with intervals to the best one, and the verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev

from tunekit.artifacts.report.compare import comparison_report, number_text
from tunekit.artifacts.report.paired import LEVEL, PairedDifference, pooled_difference
from tunekit.artifacts.report.sections import ReportPage, ReportSection, ReportTable
from tunekit.artifacts.report.values import RunValues
from tunekit.errors import NumericsError, listed
from tunekit.recipe.reading.names import facts_of
from tunekit.records import JsonObject

MOST_NAMED = 4


@dataclass(frozen=True)
class Setting:
    """The runs of one setting, one per seed. `outcomes`: the metric of each run, None unless the run is finished.
    `difference`: its loss less that of the best setting."""

    name: str
    runs: Sequence[RunValues]
    outcomes: Sequence[float | None]
    difference: PairedDifference | None = None

    @property
    def numbers(self) -> list[float]:
        """The metric of the finished runs."""
        return [value for value in self.outcomes if value is not None]

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None if no run is finished."""
        return fmean(self.numbers) if self.numbers else None

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for fewer than two finished runs."""
        return stdev(self.numbers) if len(self.numbers) > 1 else None


@dataclass(frozen=True)
class SweepResults:
    """The settings of a sweep, the best one first and those without a finished run last. `by`: eval.METRIC."""

    by: str
    settings: Sequence[Setting]

    @property
    def best(self) -> Setting | None:
        """The best setting; None if no run is finished."""
        return self.settings[0] if self.settings and self.settings[0].numbers else None

    @property
    def metric(self) -> str:
        """The name of the metric in words."""
        return self.by.replace(".", " ").replace("_", " ")

    def verdict(self) -> str:
        """One sentence about the best setting, and how sure it is."""
        finished = [setting for setting in self.settings if setting.numbers]
        if self.best is None or self.best.mean is None:
            return "no trial is finished"
        first = f"{self.best.name} has the best {self.metric}, {number_text('', self.best.mean)}"
        compared = [setting for setting in finished[1:] if setting.difference is not None]
        if len(finished) == 1:
            return f"only {self.best.name} is finished: {self.metric} {number_text('', self.best.mean)}"
        if self.by != "eval.loss" or len(compared) < len(finished) - 1:
            return f"{first}; there is no interval, because only losses of the same evaluation rows are compared"
        rows = min(setting.difference.rows for setting in compared if setting.difference)
        equal = [setting.name for setting in compared if setting.difference and setting.difference.low <= 0]
        if not equal:
            return f"{first}; it is lower than all others on {rows:,} evaluation rows ({LEVEL:.0%} intervals)"
        return f"{first}; it cannot be distinguished from {listed(equal, MOST_NAMED)} on {rows:,} evaluation rows"

    def table(self) -> tuple[list[str], list[list[object]]]:
        """The head and the lines of the table of settings."""
        seeds = max(len(setting.runs) for setting in self.settings)
        head = ["trial", self.metric, *(["over seeds"] if seeds > 1 else []), "loss less the best's", "state"]
        lines: list[list[object]] = []
        for setting in self.settings:
            spread = "–" if setting.spread is None else f"± {number_text('', setting.spread)}"
            difference = setting.difference
            interval = "–" if difference is None else f"{difference.low:+.4g} to {difference.high:+.4g}"
            states = "; ".join(dict.fromkeys(run.state for run in setting.runs))
            cells = [number_text("", setting.mean), *([spread] if seeds > 1 else []), interval, states]
            lines.append([setting.name, *cells])
        return head, lines

    def values(self) -> JsonObject:
        """The content of sweep.json, without the values of the trials."""
        settings = [
            {
                "setting": setting.name,
                "mean": setting.mean,
                "spread": setting.spread,
                "difference": None if setting.difference is None else asdict(setting.difference),
                "runs": [
                    {"name": run.name, "state": run.state, "outcome": outcome}
                    for run, outcome in zip(setting.runs, setting.outcomes, strict=True)
                ],
            }
            for setting in self.settings
        ]
        return {"by": self.by, "verdict": self.verdict(), "settings": settings}

    def page(self) -> ReportPage | None:
        """The page of the sweep; None if no run is finished."""
        finished = [run for setting in self.settings for run in _finished(setting).values()]
        if not finished:
            return None
        head, lines = self.table()
        text = f"Intervals ({LEVEL:.0%}) of the difference of the losses on the evaluation rows that both evaluated."
        section = ReportSection("Trials", [text], tables=[ReportTable(head, lines, best=0)])
        page = comparison_report(finished)
        title = f"Sweep of {sum(len(setting.runs) for setting in self.settings)} trials"
        return replace(page, title=title, sections=[section, *page.sections], verdict=self.verdict())


def sweep_results(by: str, runs: Mapping[str, Sequence[RunValues]], *, finished: bool = True) -> SweepResults:
    """The results of the runs of each setting. `finished`: only of finished runs; otherwise each run's last evaluation
    counts."""
    metric = by.removeprefix("eval.")
    higher = metric != "loss" and facts_of("metrics", metric).HIGHER_IS_BETTER
    settings = [
        Setting(name, members, [_outcome(run, metric, finished) for run in members]) for name, members in runs.items()
    ]
    measured = [(setting.mean, setting) for setting in settings if setting.mean is not None]
    ordered = [setting for _, setting in sorted(measured, key=lambda pair: -pair[0] if higher else pair[0])]
    compared = [replace(setting, difference=_difference(ordered[0], setting)) for setting in ordered[1:]]
    return SweepResults(by, [*ordered[:1], *compared, *(setting for setting in settings if not setting.numbers)])


def _outcome(run: RunValues, metric: str, finished: bool) -> float | None:
    """The metric of the exported weights; None if the run does not count, or if its numbers became invalid."""
    code = run.status.get("exit_code")
    counts = code == 0 if finished else code != NumericsError.exit_code
    return run.exported.numbers("eval").get(metric) if counts else None


def _finished(setting: Setting) -> dict[int, RunValues]:
    """The finished runs by the number of their seed."""
    pairs = zip(setting.runs, setting.outcomes, strict=True)
    return {number: run for number, (run, outcome) in enumerate(pairs) if outcome is not None}


def _difference(best: Setting, other: Setting) -> PairedDifference | None:
    """The difference over the seeds that both settings have finished."""
    first, second = _finished(best), _finished(other)
    return pooled_difference([(first[number], second[number]) for number in first if number in second])
