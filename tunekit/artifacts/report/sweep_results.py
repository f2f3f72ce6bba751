"""The results of a sweep: the settings sorted by their metric, with their difference from the best setting, and the
verdict."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from tunekit.artifacts.report.compare import number_text
from tunekit.artifacts.report.paired import LEVEL, PairedDifference, pooled_difference
from tunekit.artifacts.report.values import RunValues
from tunekit.basics import student
from tunekit.errors import NumericsError, listed
from tunekit.files.untrusted import printable
from tunekit.recipe.reading.names import facts_of
from tunekit.records import JsonObject

MOST_NAMED = 4
MOST_REASON = 10_000  # characters
FINISHED, HALVED, FAILED, STOPPED = "finished", "ended by halving", "failed", "stopped"
ENDED_BY_TIME, UNFINISHED, WAITING = "stopped by max_minutes", "not finished", "not started"
SIGNALLED = 128  # exit codes above it are those of signals
LEFT_OUT = "without="  # in the name of a trial, before the source that is left out


@dataclass(frozen=True)
class Setting:
    """The runs of one setting, one run per seed and fold. `outcomes`: the metric of each run; None if the run is not
    finished. `evaluated`: step and metric of each run's exported weights, or of the last evaluation of a run that is
    not finished; None without evaluations. `difference`: the setting's metric minus the metric of the best setting;
    `clear`: whether it is worse, and chance is unlikely to explain this. `contrary`: the same, but it is better on the
    rows and seeds that both have: the means are over others too."""

    name: str
    runs: Sequence[RunValues]
    outcomes: Sequence[float | None]
    evaluated: Sequence[tuple[int, float] | None]
    difference: PairedDifference | None = None
    clear: bool = False
    contrary: bool = False

    @property
    def numbers(self) -> list[float]:
        """The metric of the finished runs."""
        return [value for value in self.outcomes if value is not None]

    @property
    def mean(self) -> float | None:
        """The mean over seeds and folds; None if no run is finished."""
        return fmean(self.numbers) if self.numbers else None

    @property
    def is_complete(self) -> bool:
        """Whether every run is finished. If not, other settings' means are over other seeds or folds."""
        return len(self.numbers) == len(self.outcomes)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds and folds; None for fewer than two finished runs."""
        return stdev(self.numbers) if len(self.numbers) > 1 else None

    @property
    def states(self) -> str:
        """The different states of the runs."""
        return "; ".join(dict.fromkeys(map(state_of_run, self.runs)))

    @property
    def metric_text(self) -> str:
        """The mean. If no run is finished, the mean of the last evaluations and their steps."""
        last = [pair for pair in self.evaluated if pair is not None]
        if self.mean is not None or not last:
            return number_text("", self.mean)
        steps = sorted({step for step, _ in last})
        name = "step" if len(steps) == 1 else "steps"
        return f"{number_text('', fmean(value for _, value in last))} at {name} {', '.join(f'{s:,}' for s in steps)}"


@dataclass(frozen=True)
class SweepResults:
    """The settings of a sweep, best first. Settings with an unfinished run come after the others, then the settings
    that halving ended; other settings without a finished run come last.

    `by`: eval.METRIC. `higher`: whether a higher metric is better. `folds`: the number of folds of each seed; None
    without cross-validation. `earlier`: the verdict at the last comparison of successive halving.
    """

    by: str
    settings: Sequence[Setting]
    higher: bool = False
    folds: int | None = None
    earlier: str = ""

    @property
    def runs(self) -> int:
        """The number of runs of each setting."""
        return max((len(setting.runs) for setting in self.settings), default=0)

    @property
    def over(self) -> str:
        """What differs between the runs of a setting."""
        several_seeds = self.folds is None or self.runs > self.folds
        return " and ".join(["seeds"] * several_seeds + ["folds"] * (self.folds is not None))

    @property
    def best(self) -> Setting | None:
        """The best setting; None if no run is finished."""
        return self.settings[0] if self.settings and self.settings[0].numbers else None

    @property
    def incomplete(self) -> str:
        """A comment for the recipe of the best setting that names the settings without a full result; empty if every
        run is finished."""
        partial = [each for each in self.settings if not each.is_complete or ENDED_BY_TIME in each.states]
        names = [f"{setting.name} ({setting.states})" for setting in partial]
        return f"# best of a sweep in which not every run is finished: {', '.join(names)}\n" if names else ""

    @property
    def metric(self) -> str:
        """The name of the metric for texts, without dots and underscores."""
        return self.by.replace(".", " ").replace("_", " ")

    @property
    def unclear(self) -> list[Setting]:
        """The settings that cannot be distinguished from the best one."""
        compared = (setting for setting in self.settings if setting.difference is not None)
        return [setting for setting in compared if not setting.clear and not setting.contrary]

    @property
    def is_clear(self) -> bool:
        """Whether the best setting is clearly better than each other finished setting."""
        others = [setting for setting in self.settings if setting.numbers][1:]
        return bool(others) and all(setting.difference is not None and setting.clear for setting in others)

    @property
    def several(self) -> bool:
        """Whether a setting has several runs."""
        return self.runs > 1

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Name and reason of each run that failed."""
        runs = [run for setting in self.settings for run in setting.runs]
        return [(run.name, reason_of(run)) for run in runs if state_of_run(run) == FAILED]

    def verdict(self) -> str:
        """A sentence that names the best setting, and says whether it is clearly better than the others."""
        finished = [setting for setting in self.settings if setting.numbers]
        counts = Counter(setting.states for setting in self.settings if not setting.numbers)
        number = counts.pop(FINISHED, 0)
        without = [f"{number} finished without a number for {self.metric}"] if number else []
        if self.best is None or self.best.mean is None:
            return "; ".join(without) or "no trial is finished"
        parts = [
            f"{each.name} {'has a number for' if each.states == FINISHED else 'finished'} only {len(each.numbers)} of "
            f"{len(each.runs)} runs"
            for each in finished
            if not each.is_complete
        ]
        others = ", ".join(f"{count} {states}" for states, count in counts.items())
        return "; ".join(
            [
                self._ranking(self.best, self.best.mean, finished),
                *([listed(parts, MOST_NAMED)] if parts else []),
                *without,
                *([f"not finished: {others}"] if others else []),
            ]
        )

    def _ranking(self, best: Setting, mean: float, finished: Sequence[Setting]) -> str:
        """The part of the verdict about the finished settings."""
        if len(self.settings) == 1:
            spread = (
                "" if best.spread is None else f" ± {number_text('', best.spread)} over {len(best.numbers)} {self.over}"
            )
            return f"{self.metric} {number_text('', mean)}{spread}"
        first = f"{best.name} has the best {self.metric}, {number_text('', mean)}"
        compared = [setting.difference for setting in finished[1:] if setting.difference is not None]
        if len(finished) == 1:
            return self._only(best, mean)
        if len(compared) < len(finished) - 1:
            what = "the runs have no values for the same rows"
            return f"{first}; there is no interval, because {what}"
        rows = f"on {min(difference.rows for difference in compared):,} evaluation rows"
        if self.is_clear:
            level = f"({LEVEL:.0%} intervals{self._seeds_note()})"
            return f"{first}; it is {'higher' if self.higher else 'lower'} than all others {rows} {level}"
        equal, contrary = [each.name for each in self.unclear], [each.name for each in finished if each.contrary]
        few = {each.name: each.difference for each in self.unclear if each.difference and each.difference.too_few}
        needed = max((each.needed_rows or 0 for each in few.values()), default=0)
        why = (
            f" (a few rows differ much more than the others from {listed(list(few), MOST_NAMED)}, so {needed:,} rows "
            "are needed)"
        )
        cannot = f"it cannot be distinguished from {listed(equal, MOST_NAMED)} {rows}{why if few else ''}"
        parts = [cannot] if equal else []
        if contrary:
            what = f"on the runs and rows that both have, {listed(contrary, MOST_NAMED)}"
            parts.append(f"{what} {'is' if len(contrary) == 1 else 'are'} better")
        return "; ".join([first, *parts])

    def _only(self, best: Setting, mean: float) -> str:
        """The part of the verdict if a single setting is finished, perhaps the winner of halving's comparisons."""
        result = f"{self.metric} {number_text('', mean)}"
        if not self.earlier.startswith(f"{best.name} has the best "):
            return f"only {best.name} is finished: {result}"
        _, unclear, names = self.earlier.partition("; it cannot be distinguished from ")
        unsure = f"; at the last one it could not be distinguished from {names}" if unclear else ""
        return f"{best.name} won the comparisons: {result}{unsure}"

    def contributions(self) -> list[str]:
        """With sweep.leave_out: a sentence for each source, which compares the runs without it with the runs on all
        sources."""
        settings = {setting.name: setting for setting in self.settings}
        pairs = [
            (settings.get(f"{before}{LEFT_OUT}nothing"), setting)
            for setting in self.settings
            for before, _, source in [setting.name.rpartition(LEFT_OUT)]
            if source not in ("", "nothing") and LEFT_OUT in setting.name
        ]
        metric = self.by.removeprefix("eval.")
        compared = [_compared(one, other, metric, self.higher, self.folds) for one, other in pairs if one is not None]
        shown = [each.difference for each in compared if each.difference is not None]
        return [each.sentence(metric.replace("_", " "), higher=self.higher) for each in shown]

    def _seeds_note(self) -> str:
        """States that the intervals do not cover the choice of the seed, if every setting has one seed."""
        alone = self.runs == (self.folds or 1)
        return ", with one seed; sweep.seeds: 3 also measures other seeds" if alone else ""

    def table(self) -> tuple[list[str], list[list[object]]]:
        """The headings and the lines of the table of settings."""
        less = f"{self.metric.removeprefix('eval ')} minus the best's\n({LEVEL:.0%} interval)"
        deviation = [f"standard deviation\nover {self.over}"] if self.several else []
        head = ["setting" if self.several else "trial", self.metric, *deviation, less, "state"]
        lines: list[list[object]] = []
        for setting in self.settings:
            spread = "–" if setting.spread is None else f"± {number_text('', setting.spread)}"
            difference = "–" if setting.difference is None else setting.difference.short_text()
            if setting.difference is not None and setting.difference.too_few:
                difference += ",\ntoo few rows"
            states = "; ".join(dict.fromkeys(map(_short_state, setting.runs)))
            lines.append([setting.name, setting.metric_text, *([spread] if deviation else []), difference, states])
        return head, lines

    def values(self) -> JsonObject:
        """The content of sweep.json, except the values that each trial tried."""
        settings = [
            {
                "setting": setting.name,
                "mean": setting.mean,
                "spread": setting.spread,
                "difference": None if (pair := setting.difference) is None else pair.values(),
                "runs": [
                    {"name": run.name, "state": state_of_run(run), "reason": reason_of(run), "outcome": outcome}
                    | {"evaluated": None if last is None else {"step": last[0], "value": last[1]}}
                    for run, outcome, last in zip(setting.runs, setting.outcomes, setting.evaluated, strict=True)
                ],
            }
            for setting in self.settings
        ]
        return {"by": self.by, "verdict": self.verdict(), "settings": settings}


def sweep_results(
    by: str, runs: Mapping[str, Sequence[RunValues]], *, finished: bool = True, folds: int | None = None
) -> SweepResults:
    """The results of each setting's runs, which are in the order of their seeds, and of the folds of each seed.
    `finished`: only finished runs count; if false, the evaluation that any run would export now counts. `folds`: as in
    SweepResults."""
    metric = by.removeprefix("eval.")
    higher = metric != "loss" and facts_of("metrics", metric).HIGHER_IS_BETTER
    settings = [
        Setting(
            name,
            members,
            [_outcome(run, metric, finished) for run in members],
            [_evaluated(run, metric) for run in members],
        )
        for name, members in runs.items()
    ]
    measured = [
        (not setting.is_complete, -setting.mean if higher else setting.mean, setting)
        for setting in settings
        if setting.mean is not None
    ]
    ordered = [setting for *_, setting in sorted(measured, key=lambda each: each[:2])]
    compared = [_compared(ordered[0], setting, metric, higher, folds) for setting in ordered[1:]]
    unmeasured = sorted((each for each in settings if not each.numbers), key=lambda each: each.states != HALVED)
    return SweepResults(by, [*ordered[:1], *compared, *unmeasured], higher, folds)


def _outcome(run: RunValues, metric: str, finished: bool) -> float | None:
    """The metric of a run's exported weights. None if the run does not count (not finished, or ended by non-finite
    numbers)."""
    code = run.status.get("exit_code")
    counts = code == 0 if finished else code != NumericsError.exit_code
    return run.exported.numbers("eval").get(metric) if counts else None


def _evaluated(run: RunValues, metric: str) -> tuple[int, float] | None:
    """Step and metric of the exported weights, or of the last evaluation if the run is not finished."""
    value = run.exported.numbers("eval").get(metric)
    return None if value is None else (run.exported.count("step"), value)


def state_of_run(run: RunValues) -> str:
    """The state of a run in a few words that scripts can compare."""
    code = run.status.get("exit_code")
    if run.is_stopped_by_time:
        return ENDED_BY_TIME
    if code == 0 or (code is None and run.report):
        return FINISHED
    if not isinstance(code, int):
        return UNFINISHED if run.status else WAITING
    if reason_of(run).startswith(HALVED):
        return HALVED
    return STOPPED if code > SIGNALLED else FAILED


def reason_of(run: RunValues) -> str:
    """Why the run ended, in full; empty if it has not started."""
    return printable(str(run.status.get("reason", "")), MOST_REASON)


def _short_state(run: RunValues) -> str:
    """The state for a table: also whether a finished run was stopped early, but not the text of a failure."""
    state = state_of_run(run)
    return run.state if state in (FINISHED, ENDED_BY_TIME) else state


def finished_runs(setting: Setting) -> dict[int, RunValues]:
    """The finished runs of a setting, by their index in `runs`. The same index means the same seed and fold in every
    setting."""
    pairs = zip(setting.runs, setting.outcomes, strict=True)
    return {number: run for number, (run, outcome) in enumerate(pairs) if outcome is not None}


def _compared(best: Setting, other: Setting, metric: str, higher: bool, folds: int | None) -> Setting:
    """A copy of `other` with its difference from the best setting, over the seeds and folds that both have finished.
    With several seeds, the interval also covers the choice of the seeds."""
    first, second = finished_runs(best), finished_runs(other)
    numbers = [number for number in first if number in second]
    difference = pooled_difference([(first[number], second[number]) for number in numbers], metric)
    if difference is None:
        return other
    of_seeds: dict[int, list[float]] = {}
    for number in numbers:
        changed = (other.outcomes[number] or 0.0) - (best.outcomes[number] or 0.0)
        of_seeds.setdefault(number // (folds or 1), []).append(changed)
    difference = replace(difference, run=other.name, than=best.name)
    if len(of_seeds) > 1:
        difference = _over_seeds(difference, [fmean(values) for values in of_seeds.values()])
    signs = (difference.higher, difference.lower)
    clear, contrary = reversed(signs) if higher else signs
    return replace(other, difference=difference, clear=clear, contrary=contrary)


def _over_seeds(difference: PairedDifference, of_seeds: Sequence[float]) -> PairedDifference:
    """The difference with a wider interval. Its half is the root of the sum of two squares: the half of the interval
    over rows, and the half of Student's interval over the differences `of_seeds`."""
    half = student(len(of_seeds) - 1) * stdev(of_seeds) / len(of_seeds) ** 0.5
    middle = difference.difference
    low, high = (
        middle - math.hypot(middle - difference.low, half),
        middle + math.hypot(difference.high - middle, half),
    )
    too_few = difference.too_few and not low <= 0 <= high
    needed = difference.needed_rows if too_few or low <= 0 <= high else None
    return replace(difference, low=low, high=high, needed_rows=needed, too_few=too_few)
