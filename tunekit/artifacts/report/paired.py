"""Compares each run with the first run: the difference of their evaluation loss (or another metric) on rows that both
evaluated, with a confidence interval."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from tunekit.artifacts.report.sections import Tone
from tunekit.artifacts.report.values import RunValues, Values
from tunekit.basics import NORMAL_95, reach_of_equal, student
from tunekit.records import Headline, JsonObject

Losses = NDArray[np.float64]
LEVEL = 0.95
SKEWED = 25  # rows for a squared skewness of 1 (Cochran's rule)
WIDEST = 5.0  # an interval so much wider holds for few skewed rows (measured in a simulation, see the tests)
POWER = 0.84  # the 80 % quantile of the normal distribution
MOST_RATIO = 1e6  # of the error to the difference; a smaller difference needs more rows than any file has
SAME = 1e-9  # relative; a smaller error of the mean is that of rounding
HEADING = [  # of the table with `PairedDifference.texts` as lines
    "run",
    "rows in both",
    "loss of the first run",
    "loss of this run",
    "95 % interval of the difference",
    "verdict",
]


@dataclass(frozen=True)
class PairedDifference:
    """The difference between a run and the first run in evaluation loss (or another metric), on `rows` rows that both
    evaluated. `low` to `high`: its 95 % interval. `start`: the loss before training.

    `needed_rows`: if these rows do not show which run is better, the number of rows that probably would. `too_few`:
    whether a few rows differ so much more than the others that so few rows show nothing.
    """

    run: str
    than: str
    rows: int
    value: float
    than_value: float
    low: float
    high: float
    start: float | None = None
    needed_rows: int | None = None
    too_few: bool = False

    @property
    def lower(self) -> bool:
        """Whether the rows show that this run's value is lower."""
        return self.high < 0 and not self.too_few

    @property
    def higher(self) -> bool:
        """Whether the rows show that this run's value is higher."""
        return self.low > 0 and not self.too_few

    @property
    def difference(self) -> float:
        """The difference of the two values."""
        return self.value - self.than_value

    @property
    def tone(self) -> Tone:
        """The tone of the sentence: good if the run is better than the first run, bad if it is worse."""
        return "good" if self.lower else "bad" if self.higher else "neutral"

    def sentence(self, metric: str = "loss", *, higher: bool = False) -> str:
        """A sentence that says which run is better, or that these rows cannot show this. `higher`: whether a higher
        metric is better."""
        first = f"evaluation {metric} {self.value:.4g} against {self.than_value:.4g}"
        start = "" if self.start is None else f", {self.start:.4g} before training"
        interval = f"95 % interval of the difference {self.low:+.4g} to {self.high:+.4g} on {self.rows:,} rows"
        facts = f"{first}{start} ({interval})"
        if self.lower or self.higher:
            better = self.higher == higher
            return f"{self.run} is {'better' if better else 'worse'} than {self.than}: {facts}"
        if self.too_few:
            few = (
                f"a few of the {self.rows:,} rows differ much more than the others, so {self.needed_rows:,} are needed"
            )
            return f"too few rows to distinguish {self.run} and {self.than}: {facts}; {few}"
        more = "" if self.needed_rows is None else f"; about {self.needed_rows:,} rows would show such a difference"
        return f"{self.run} and {self.than} cannot be distinguished: {facts}{more}"

    def short_text(self) -> str:
        """The difference with its interval, such as +0.0146 (-0.0865 to +0.1157). All numbers have equally many
        decimals: the largest one has four digits."""
        largest = max(map(abs, (self.difference, self.low, self.high)))
        decimals = max(3 - math.floor(math.log10(largest)), 0) if largest > 0 else 4
        texts = [f"{round(each, decimals) + 0.0:+.{decimals}f}" for each in (self.difference, self.low, self.high)]
        return f"{texts[0]} ({texts[1]} to {texts[2]})"

    def values(self) -> JsonObject:
        """The fields and the difference, for JSON."""
        return {**asdict(self), "difference": self.difference}

    def texts(self) -> list[str]:
        """The cells of this run's line in the table of differences."""
        unclear = "too few rows" if self.too_few else "no clear difference"
        sure = "lower" if self.lower else "higher" if self.higher else unclear
        interval = f"{self.low:+.4g} to {self.high:+.4g}"
        return [self.run, f"{self.rows:,}", f"{self.than_value:.4g}", f"{self.value:.4g}", interval, sure]


def differences(runs: Sequence[RunValues]) -> list[PairedDifference]:
    """The difference between each run and the first run. Runs with a different objective or without common rows are
    left out."""
    results = (pooled_difference([(runs[0], run)]) for run in runs[1:])
    return [result for result in results if result is not None]


def pooled_difference(pairs: Sequence[tuple[RunValues, RunValues]], metric: str = "loss") -> PairedDifference | None:
    """The difference between the second and the first run of each pair, averaged over all pairs (for example, one pair
    per seed). Every pair has the same weight, so that the difference is that of the means over the runs. None if there
    are fewer than two common rows.

    A row that several pairs have is resampled for all of them at once; so are the copies of a repeated row, which
    count as one row. `metric`: the loss, or a metric that is a mean over rows.
    """
    digests, losses = list[str](), list[Losses]()
    for one, other in pairs:
        rows = _pairs(one, other, metric)
        units = sum(float(values[2]) for values in rows.values()) if len(pairs) > 1 else 1.0
        digests += [digest for digest, _ in rows]
        losses += [values / units for values in rows.values()]
    different = different_rows(digests, losses)
    return None if len(different) < 2 else _difference(*pairs[0], different)


def _difference(one: RunValues, other: RunValues, losses: Losses) -> PairedDifference:
    """The difference for these rows. Shapes: `losses` (rows, 4), one row of numbers as `_pairs` returns it."""
    than_loss, loss, units, before = losses.T
    low, high = difference_interval(than_loss, loss, units)
    means = [float(each.sum() / units.sum()) for each in (loss, than_loss, before)]
    clear = high < 0 or low > 0
    skewed = rows_for_skewness(loss - than_loss, units) if clear else None
    needed = skewed if clear else rows_needed(than_loss, loss, units)
    start = means[2] if math.isfinite(means[2]) else None
    return PairedDifference(
        other.name, one.name, len(losses), means[0], means[1], low, high, start, needed, skewed is not None
    )


def rows_needed(one: Losses, other: Losses, units: Losses) -> int | None:
    """The number of rows that would show the measured difference with 80 % probability at the 5 % level, if more rows
    vary as much as these rows: n ((t + 0.84) error / difference)^2, where t is Student's quantile for that number of
    rows. None if there is no difference, if it is far below its error, or if these rows are enough.

    Shapes: (rows,) each, as in `paired_interval`.    Source: Miller 2024, Adding error bars to evals, section 5 (power,
    paired differences); Cohen 1988, section 2.4.
    """
    difference = abs(float((other - one).sum() / units.sum()))
    if not difference:
        return None
    ratio = ratio_error(other - one, units) / difference
    if not ratio < MOST_RATIO:  # also of damaged losses, whose squares overflow
        return None
    variance = len(units) * ratio**2  # of one row, in squared differences
    rows = max(math.ceil(variance * (NORMAL_95 + POWER) ** 2), 2)
    while rows < variance * (student(rows - 1) + POWER) ** 2:  # a few times, because t falls quickly to 1.96
        rows += 1
    return rows if rows > len(units) else None


def who_won(runs: Sequence[RunValues], paired: Sequence[PairedDifference]) -> list[str]:
    """A sentence for each run after the first run, with which it is compared. Empty if a metric other than the loss
    shows how good a run is."""
    if any(run.shows.headline != Headline() for run in runs):
        return []
    sentences = {each.run: each.sentence() for each in paired}
    why = "they have fewer than two evaluation rows in common, or different objectives or reference models"
    if not paired and len(runs) > 1:
        return [f"the runs cannot be compared: {why}"]
    other = f"cannot be compared with {runs[0].name}: {why}"
    return [sentences.get(run.name, f"{run.name} {other}") for run in runs[1:]]


def _pairs(one: RunValues, other: RunValues, metric: str) -> dict[tuple[str, int], Losses]:
    """For each row that both runs evaluated, four numbers (4,): its value in `one`, its value in `other`, its units,
    and its value in `one` before training (NaN if not measured, or if it is different in `other`). If a row occurs
    several times, its occurrences are matched in order."""
    if metric == "loss" and _loss_settings(one) != _loss_settings(other):
        return {}
    first, second = (dict(_keyed(_rows_of(run, metric))) for run in (one, other))
    both = {
        key: (first[key][0], *second[key][:2], _same(first[key][2], second[key][2])) for key in first if key in second
    }
    return {key: np.array(values, np.float64) for key, values in both.items() if None not in values[:3] and values[2]}


def _same(before: float | None, other: float | None) -> float | None:
    """The loss of a row before training; None if the runs have different ones, because their bases differ."""
    differ = before is not None and other is not None and not math.isclose(before, other, rel_tol=0.01, abs_tol=1e-6)
    return None if differ else before


def _loss_settings(run: RunValues) -> str:
    """The settings of the objective that affect the loss of an evaluation, as JSON. A run of an earlier version lacks
    new settings, which have their defaults then. A loss relative to the policy at step 0 depends on this policy too."""
    others, objective = (*run.objective.free_keys, *run.objective.training_keys), run.objective
    fields = objective.model_fields.items()
    values = {name: each.get_default(call_default_factory=True) for name, each in fields} | run.recipe.part("objective")
    base = (run.environment.part("fingerprint").get("base"), run.recipe.part("model").get("quantization"))
    policy = (*base, run.recipe.part("adapter").get("init_from"))
    relative = {"policy": policy} if objective.reference == "policy at step 0" else {}
    shown = {key: value for key, value in values.items() if key not in others} | relative
    return json.dumps(shown, default=str, sort_keys=True)


def _rows_of(run: RunValues, metric: str) -> Values:
    """The digest, loss and number of units of each row. For a metric other than the loss, `losses` contains its values,
    each with one unit."""
    if metric == "loss":
        return run.row_losses
    rows = run.row_losses.part("metrics").part(metric)
    values = rows.items_of("values")
    return Values(digests=rows.items_of("digests"), losses=values, units=[1.0] * len(values))


def _keyed(rows: Values) -> Iterator[tuple[tuple[str, int], list[float | None]]]:
    counts: Counter[str] = Counter()
    digests = map(str, rows.items_of("digests"))
    columns = rows.column("losses"), rows.column("units")
    before = rows.column("before") or [None] * len(columns[0])
    for digest, *values in zip(digests, *columns, before, strict=True):
        yield (digest, counts[digest]), values
        counts[digest] += 1


def difference_interval(one: Losses, other: Losses, units: Losses) -> tuple[float, float]:
    """Student's interval of sum(other) / sum(units) - sum(one) / sum(units). If all rows differ by the same amount,
    such as a metric that is 0 or 1, the interval is that of `reach_of_equal`.

    Shapes: (rows,) each, with at least two rows; losses are sums over each row's units.    Source: Cochran 1977,
    section 6.3.
    """
    rows, middle = len(units), float((other - one).sum() / units.sum())
    error = ratio_error(other - one, units)
    equal = error <= SAME * abs(middle)
    reach = reach_of_equal(middle, rows) if equal else student(rows - 1) * error
    return middle - reach, middle + reach


def rows_for_skewness(sums: Losses, units: Losses) -> int | None:
    """The number of rows above which Student's interval misses the mean in at most 6 % of samples: 25 times the squared
    skewness of the rows. None if these rows are enough, or if 0 is outside of an interval that is wider by the squared
    ratio of the two numbers.

    Shapes: (rows,) each.    Source: Cochran 1977, section 2.15.
    """
    residuals = sums - sums.sum() / units.sum() * units  # (rows,)
    square = float((residuals**2).mean())
    if not math.isfinite(square) or math.sqrt(square) <= SAME * float(abs(sums).max(initial=0.0)):
        return None  # damaged rows, or rows that differ by the same amount
    rows = math.ceil(SKEWED * float((residuals**3).mean()) ** 2 / square**3)
    wider = min(max(rows / len(units), 1.0) ** 2, WIDEST) * student(len(units) - 1) * ratio_error(sums, units)
    return rows if rows > len(units) and abs(float(sums.sum() / units.sum())) <= wider else None


def different_rows(digests: Iterable[object], values: Iterable[Losses]) -> Losses:
    """The sums over the copies of each row, so that a repeated row counts as one row. The order is that of the first
    copies.

    Shapes: `values` (rows, n); the result (different rows, n). `digests`: one for each row, equal for copies.
    """
    sums: dict[object, Losses] = {}
    for digest, row in zip(digests, values, strict=True):
        sums[digest] = sums[digest] + row if digest in sums else row
    return np.array(list(sums.values()))


def ratio_error(sums: Losses, units: Losses) -> float:
    """The standard error of sum(sums) / sum(units) over rows: sqrt(n / (n - 1) sum((s - r u)^2)) / sum(u).

    Shapes: (rows,) each, with at least two rows.    Source: Cochran 1977, section 2.11; Miller 2024, Adding error bars
    to evals, section 2.
    """
    rows, total = len(units), float(units.sum())
    residuals = sums - sums.sum() / total * units  # (rows,)
    return math.sqrt(rows / (rows - 1) * float((residuals**2).sum())) / total
