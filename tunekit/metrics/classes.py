"""Precision, recall and F1 of each label, computed from counts."""

from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.basics import JsonObject

COLUMNS = ("label", "precision", "recall", "f1", "threshold", "mse", "pearson", "spearman", "rows")
MOST_SHOWN = 12


def class_facts(classes: Mapping[str, Any]) -> JsonObject:
    """The class counts of an evaluation, with `per_class` added: a line for each label, computed from its `counts`
    (predicted right, predicted, true). If `per_class` already exists, nothing is changed.
    A share with denominator 0 is 0, as in scikit-learn's classification_report."""
    if "per_class" in classes:
        return dict(classes)
    lines = []
    for label, (right, predicted, there) in zip(classes["labels"], classes["counts"], strict=True):
        shares = {"precision": _share(right, predicted), "recall": _share(right, there)}
        lines.append({"label": label, **shares, "f1": f1(right, predicted, there), "rows": there})
    for line, threshold in zip(lines, classes.get("thresholds", ()), strict=False):
        line["threshold"] = threshold
    return {"per_class": lines, **{name: value for name, value in classes.items() if name != "counts"}}


def confusion_table(facts: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]] | None:
    """Header and lines of the confusion matrix; None if there is no matrix, or if it is too large to show."""
    if "confusion" not in facts or len(labels := facts["labels"]) > MOST_SHOWN:
        return None
    rows = zip(labels, facts["confusion"], strict=True)
    return ["true, then predicted as", *labels], [[label, *row] for label, row in rows]


def confused_pairs(facts: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]] | None:
    """Header and lines of a table of the pairs of labels that are confused most often; None if none is confused."""
    labels, matrix = facts.get("labels", ()), facts.get("confusion", ())
    cells = ((count, true, other) for true, row in enumerate(matrix) for other, count in enumerate(row))
    wrong = sorted((cell for cell in cells if cell[0] and cell[1] != cell[2]), key=lambda cell: -cell[0])
    lines = [[labels[true], labels[other], count] for count, true, other in wrong[:MOST_SHOWN]]
    return (["true label", "predicted as", "rows"], lines) if lines else None


def never_right(facts: Mapping[str, Any]) -> list[str]:
    """The labels of some rows whose F1 is 0: no row with this label is predicted right."""
    return [line["label"] for line in facts["per_class"] if line.get("rows") and line.get("f1") == 0]


def class_table(
    labels: Sequence[str], counts: Sequence[Sequence[float]], confusion: Sequence[Sequence[float]] | None = None
) -> JsonObject:
    """A mapping with the labels, their counts (correct, predicted, true) and, if given, their confusion matrix."""
    whole = [[int(count) for count in row] for row in counts]
    matrix = {} if confusion is None else {"confusion": [[int(count) for count in row] for row in confusion]}
    return {"labels": list(labels), "counts": whole, **matrix}


def columns_of(facts: Mapping[str, Any]) -> list[str]:
    """The names of the columns in `per_class`, in order."""
    return [name for name in COLUMNS if any(name in line for line in facts["per_class"][:1])]


def f1(right: float, predicted: float, there: float) -> float:
    """F1 = 2 TP / (2 TP + FP + FN); 0 if the denominator is 0."""
    return _share(2 * right, predicted + there)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
