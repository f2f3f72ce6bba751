"""Reads the rows of the run that made a target. Missing rows are no error: comparisons then use other inputs."""

from tunekit.contracts import Objective
from tunekit.data.rows import RowSet, load_rows
from tunekit.errors import DataError
from tunekit.targets.target import TargetSpec


def readable_rows(target: TargetSpec, objective: Objective | None) -> tuple[RowSet | None, str]:
    """(rows of the target's run, ""); (None, reason as text) if the data files are missing or unreadable, because a run
    can be used without its data."""
    if target.data is None or objective is None:
        return None, ""
    try:
        return load_rows(target.data, objective, seed=target.seed), ""
    except DataError as error:
        problem = error.problems[0]
        place = "" if problem.file is None else f"{problem.file}: "
        return None, f", because the run's rows cannot be read ({place}{problem.what})"
