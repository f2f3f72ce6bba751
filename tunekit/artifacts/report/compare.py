"""Comparison of several runs: their results, and the differences between their recipes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from tunekit.artifacts.report.curves import binned_text, charts_of
from tunekit.artifacts.report.paired import HEADING, differences, who_won
from tunekit.artifacts.report.sections import ReportPage, ReportSection, ReportTable, Tone
from tunekit.artifacts.report.values import RunValues, sizes_counted
from tunekit.files.untrusted import printable
from tunekit.records import bytes_text

MOST_SHOWN = 1000  # characters of a key's value
SEED, PLACE = "training.seed", "output.dir"
FACTS = ("final_training_loss", "tokens_per_second", "peak_memory_bytes", "training_seconds", "adapter_bytes")


@dataclass(frozen=True)
class Outcomes:
    """A table of results with one row per run. A value is None if it was not measured."""

    names: list[str]
    runs: list[str]
    values: list[list[float | None]]
    sizes: str = "tokens"  # the unit of speeds

    @property
    def labels(self) -> list[str]:
        """The names in readable form."""
        names = [f"{self.sizes} per second" if name == "tokens_per_second" else name for name in self.names]
        return [name.replace("_", " ").replace(" bytes", "") for name in names]

    def texts(self) -> list[list[str]]:
        """One line per run: its name, then its results as text."""
        return [
            [run, *(number_text(name, value) for name, value in zip(self.names, row, strict=True))]
            for run, row in zip(self.runs, self.values, strict=True)
        ]


def number_text(name: str, value: float | None) -> str:
    """A result with its unit, as text."""
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return bytes_text(int(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def comparison_report(runs: Sequence[RunValues]) -> ReportPage:
    """Make a page that compares runs: their results, the differences between their recipes, and charts with the curves
    of all runs."""
    keys, outcome, repeats, paired = differing_keys(runs), outcome_table(runs), same_but_seed(runs), differences(runs)
    sections = [ReportSection("Results", tables=[ReportTable(["run", *outcome.labels], outcome.texts())])]
    if repeats:
        head = ["runs that differ only in the seed", *outcome.labels]
        rows = [[names, *cells] for names, cells in repeats]
        sections.append(ReportSection("Mean and standard deviation over seeds", tables=[ReportTable(head, rows)]))
    if paired:
        text = f"Each run is compared with {runs[0].name} on the evaluation rows that both evaluated."
        table = ReportTable(HEADING, [each.texts() for each in paired])
        sections.append(ReportSection("Better, or by chance?", [text], tables=[table]))
    same = [] if keys else ["None: only output.dir differs between the recipes."]
    tables = [ReportTable(["key", *(run.name for run in runs)], keys, has_texts=True)] if keys else []
    sections.append(ReportSection("Differences", same, tables=tables))
    sections.append(ReportSection("Over the steps", binned_text(runs), charts=charts_of(runs)))
    won = [f"{sentence}." for sentence in who_won(runs, paired)]
    names = ", ".join(run.name for run in runs)
    if len(won) == 1:
        tone: Tone = paired[0].tone if paired else "neutral"
        return ReportPage(f"{len(runs)} runs compared", [names], sections, won[0], tone)
    return ReportPage(f"{len(runs)} runs compared", [names, *won], sections)


def differing_keys(runs: Sequence[RunValues]) -> list[list[str]]:
    """One row for each recipe key whose value differs between the runs: [key, value in each run]. output.dir is left
    out."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [
        [key, *("–" if key not in one else printable(str(one[key]), MOST_SHOWN) for one in flat)]
        for key in keys
        if key != PLACE and any(one.get(key) != flat[0].get(key) for one in flat[1:])
    ]


def _flat(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value) for every plain value. A list counts as one value, unless its items are mappings."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        for at, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{at}")
    else:
        yield key, value


def outcome_table(runs: Sequence[RunValues]) -> Outcomes:
    """The results of each run: the metrics of the exported weights, loss, speed, memory, time and size. For a single
    run, also its metrics before training."""
    evaluated = [run.exported.numbers("eval") for run in runs]
    if len(runs) == 1 and runs[0].exported_step:
        start = next((record.numbers("eval") for record in runs[0].evaluations if not record.count("step")), {})
        evaluated[0] |= {f"{name} before training": value for name, value in start.items()}
    metrics = list(dict.fromkeys(name for one in evaluated for name in one))
    rows = [[*(one.get(name) for name in metrics), *_facts(run)] for one, run in zip(evaluated, runs, strict=True)]
    names = [*(f"eval {name}" for name in metrics), *FACTS]
    return Outcomes(names, [run.name for run in runs], rows, sizes_counted(runs))


def _facts(run: RunValues) -> list[float | None]:
    loss, speed, size = map(run.report.number, ("final_loss", "tokens_per_second", "adapter_bytes"))
    peak = sum(run.report.numbers("measured_bytes").values()) or None
    return [loss, speed, peak, run.report.part("seconds").number("train"), size]


def same_but_seed(runs: Sequence[RunValues]) -> list[tuple[str, list[str]]]:
    """For each set of runs that differ only in their seed: the names of the runs, and mean ± standard deviation of each
    result."""
    outcome = outcome_table(runs)
    sets: dict[str, list[int]] = {}
    for at, run in enumerate(runs):
        same = {key: value for key, value in _flat(run.recipe) if key not in (SEED, PLACE)}
        sets.setdefault(repr(sorted(same.items(), key=lambda item: item[0])), []).append(at)
    seeds = [run.recipe.part("training").get("seed") for run in runs]
    columns = range(len(outcome.names))
    return [
        (", ".join(runs[at].name for at in members), [_spread(outcome, column, members) for column in columns])
        for members in sets.values()
        if len({seeds[at] for at in members}) > 1
    ]


def _spread(outcome: Outcomes, column: int, members: Sequence[int]) -> str:
    values = [value for at in members if (value := outcome.values[at][column]) is not None]
    if len(values) < 2:
        return "–"
    name = outcome.names[column]
    return f"{number_text(name, fmean(values))} ± {number_text(name, stdev(values))}"
