"""Counts of labels go in; precision, recall and F1 of each come out."""

from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.records import JsonObject

COLUMNS = ("label", "precision", "recall", "f1", "rows")
MOST_SHOWN = 12


def class_facts(classes: Mapping[str, Any]) -> JsonObject:
    """`per_class`, a line for each of `labels` from `counts` of each (predicted right, predicted, there at all), beside
    what else is known.

    A share of nothing is 0, as in scikit-learn's classification_report.
    """
    lines = []
    for label, (right, predicted, there) in zip(classes["labels"], classes["counts"], strict=True):
        values = (label, _share(right, predicted), _share(right, there), f1(right, predicted, there), there)
        lines.append(dict(zip(COLUMNS, values, strict=True)))
    return {"per_class": lines, **{name: value for name, value in classes.items() if name != "counts"}}


def confusion_table(facts: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]] | None:
    """Head and lines of the confusion matrix; None where there is none, or too large a one to be read."""
    labels = facts["labels"]
    if "confusion" not in facts or len(labels) > MOST_SHOWN:
        return None
    rows = zip(labels, facts["confusion"], strict=True)
    return ["true, then predicted as", *labels], [[label, *row] for label, row in rows]


def class_table(labels: Sequence[str], confusion: Sequence[Sequence[float]]) -> JsonObject:
    """Labels, their counts (correct, predicted, true) and their confusion matrix."""
    whole = [[int(count) for count in row] for row in confusion]
    return {"labels": list(labels), "counts": counts_of(whole), "confusion": whole}


def counts_of(confusion: Sequence[Sequence[float]]) -> list[tuple[int, int, int]]:
    """Of each label (right, predicted, there), from a confusion matrix whose rows are true labels."""
    predicted = [int(sum(column)) for column in zip(*confusion, strict=True)]
    return [(int(row[at]), predicted[at], int(sum(row))) for at, row in enumerate(confusion)]


def f1(right: float, predicted: float, there: float) -> float:
    """2 TP / (2 TP + FP + FN); 0 without any."""
    return _share(2 * right, predicted + there)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
