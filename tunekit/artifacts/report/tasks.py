"""The scores of lm-eval's tasks as tables, and warnings of forgetting. The scores are the plain values of
`TaskResults.values`."""

from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[object]]]
ScoreRows = Sequence[Mapping[str, Any]]


def score_table(scores: ScoreRows, before: ScoreRows = ()) -> Table:
    """The headings and lines of a table of scores. `before`: the scores of the base, which get a separate column."""
    names = ("value", "standard_error", "count")
    earlier = {(score["task"], score["metric"]): score.get("value") for score in before}
    lines = []
    for score in scores:
        place = score["task"], score["metric"]
        lines.append([*place, *([earlier.get(place)] if before else []), *(score.get(name) for name in names)])
    return ["task", "metric", *(["base"] if before else []), "value", "standard error", "documents"], lines


def change_table(changes: Sequence[Mapping[str, Any]]) -> Table:
    """The headings and lines of a table that shows how fine-tuning changed the scores."""
    return ["task", "metric", "base", "tuned", "95 % interval of the difference", "verdict"], [
        [each["task"], each["metric"], each["before"], each["after"], _interval(each), each["verdict"]]
        for each in changes
    ]


def forgetting(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each task on which the tuned model is worse than its base and chance is unlikely to explain it."""
    return [
        f"Worse than the base: {each['task']} {each['metric']}, {each['after']:.4g} instead of {each['before']:.4g} "
        f"(95 % interval of the difference: {_interval(each)}). Training on other data may restore the score."
        for each in changes
        if each["verdict"] == "worse"
    ]


def _interval(change: Mapping[str, Any]) -> str:
    return f"{change['low']:+.4g} to {change['high']:+.4g}"
