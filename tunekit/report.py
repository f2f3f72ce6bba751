"""`tunekit report`: compares runs on the screen and on a page with their curves. For a single run, it rewrites the
run's page."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tunekit.artifacts.checkpoint import list_checkpoints
from tunekit.artifacts.report.bad_signs import bad_signs
from tunekit.artifacts.report.compare import Outcomes, comparison_report, differing_keys, outcome_table, same_but_seed
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.next_step import after_training
from tunekit.artifacts.report.paired import HEADING, differences, who_won
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.values import RunValues, damage_named, read_run
from tunekit.artifacts.run import refuse_to_replace_part
from tunekit.artifacts.stopped import next_commands
from tunekit.console import Console
from tunekit.data.reading.replaced import refuse_to_replace_named
from tunekit.errors import InputError, RunFolderError
from tunekit.files.durable import json_result, write_text
from tunekit.files.lock import is_held

MOST_COLUMNS = 5  # up to this number of runs, each run is a column of the table; otherwise a line


def report_verb(folders: Sequence[str], html: str | None, json_file: str | None, csv_file: str | None) -> int:
    """Compare runs; for a single run, rewrite its report.html. Returns 2 if a damaged run was left out.

    Raises: InputError if a folder is not a run or is named twice; RunFolderError if all runs are damaged.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a run is named twice", "name each run once")
    write_result, console = json_result(json_file), Console(json_file=json_file)
    runs = _readable(paths, console)
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, named_by_path=True) for run in runs]
    for option, name in (("--html", html), ("--json", json_file), ("--csv", csv_file)):
        for run in runs:
            refuse_to_replace_named(option, name, run.recipe, run.path / "recipe.yaml")
            refuse_to_replace_part(option, name, run.path)
    outcome, keys, repeats = outcome_table(runs), differing_keys(runs), same_but_seed(runs)
    texts = zip(runs, outcome.texts(), strict=True)
    head, *lines = [["run", "state", *outcome.labels], *([name, run.state, *cells] for run, (name, *cells) in texts)]
    if len(runs) <= MOST_COLUMNS:
        head, *lines = map(list, zip(head, *lines, strict=True))
    console.table(head, lines)
    paired = differences(runs)
    if paired:
        console.table(HEADING, [each.texts() for each in paired], title="on the rows that both runs evaluated")
    console.info(*who_won(runs, paired))
    for names, cells in repeats:
        console.panel(
            f"mean and standard deviation over the seeds of {names}", dict(zip(outcome.labels, cells, strict=True))
        )
    if keys:
        console.table(["key", *(run.name for run in runs)], keys)
    elif len(runs) > 1:
        console.info("the recipes differ only in output.dir")
    page = html or (str(paths[0] / "report.html") if len(paths) == 1 else None)
    if page is not None:
        write_text(Path(page), html_page(run_report(runs[0]) if len(runs) == 1 else comparison_report(runs)))
        console.info(f"page: {page}")
    if len(paths) == 1:
        stopped = not runs[0].report and not is_held(paths[0]) and list_checkpoints(paths[0] / "checkpoints")
        console.warn(*bad_signs(runs[0]))
        console.next_steps([next_commands(paths[0])] if stopped else after_training(runs[0]))
    if csv_file is not None:
        write_text(Path(csv_file), _csv(outcome))
        console.info(f"table: {csv_file}")
    outcomes = [dict(zip(outcome.names, row, strict=True)) for row in outcome.values]
    results = [
        {"name": run.name, "path": str(run.path), "state": run.state, "outcome": values}
        for run, values in zip(runs, outcomes, strict=True)
    ]
    differing = {key: values for key, *values in keys}
    write_result({"runs": results, "differing": differing, "paired": [asdict(each) for each in paired]})
    return 2 if len(runs) < len(paths) else 0


def _readable(paths: Sequence[Path], console: Console) -> list[RunValues]:
    """The runs that are not damaged, so that they can be shown; prints a warning for each damaged run.

    Raises: RunFolderError if all runs are damaged.
    """
    runs = list[RunValues]()
    for number, path in enumerate(paths):
        try:
            with damage_named(path):
                run = read_run(path)
                html_page(run_report(run))
                html_page(comparison_report([run, run]))
        except RunFolderError as error:
            if not runs and number == len(paths) - 1:
                raise
            console.warn(f"{error}; it is left out")
        else:
            runs.append(run)
    return runs


def _csv(outcome: Outcomes) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["run", *outcome.names])
    lines.writerows([run, *row] for run, row in zip(outcome.runs, outcome.values, strict=True))
    return text.getvalue()
