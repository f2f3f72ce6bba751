"""Each sign of a bad run is named where its facts are planted, with one change; a run that went well has none."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from tests.artifacts.test_next_step import make_run
from tunekit.artifacts.report.bad_signs import bad_signs
from tunekit.artifacts.report.next_step import after_training
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.values import RunValues, Values

LORA = {"adapter": {"method": "lora"}, "objective": {"method": "classify"}, "data": {"max_length": 64}}


def make_classifier(
    losses: list[float], *, rate: float = 1e-3, evaluations: dict[int, float] | None = None, **report: Any
) -> RunValues:
    """A finished run of a classifier with a cosine schedule; 600 training rows, 160 evaluation rows."""
    recipe = {**LORA, "training": {"learning_rate": rate, "max_steps": len(losses)}}
    rows = {"training": {"trained": 600}, "evaluation": {"trained": 160}}
    run = make_run(losses, evaluations or {0: losses[0], len(losses): losses[-1]}, recipe=recipe, rows=None)
    run.plan.update(rows=rows, recipe=recipe)
    scheduled = [
        Values(record, learning_rate=rate * (1 + math.cos(math.pi * at / len(losses))) / 2)
        for at, record in enumerate(run.steps)
    ]
    facts = {"rows": {"trained": 600}, "rows_per_step": 16, **report}
    return replace(run, steps=scheduled, report=Values(facts))


def noisy(*values: float) -> list[float]:
    """Losses on the line through these values, 30 steps between two of them, with noise."""
    line = [a + (b - a) * at / 30 for a, b in pairwise(values) for at in range(30)]
    return [value * (1 + 0.01 * math.sin(7.0 * at)) for at, value in enumerate(line)]


FELL = noisy(2.5, 0.6, 0.2, 0.05)


def table(counts: list[tuple[str, float, int]]) -> dict[str, Any]:
    """The labels of an evaluation with their F1 and rows."""
    return {"per_class": [{"label": name, "f1": f1, "rows": rows} for name, f1, rows in counts]}


@pytest.mark.parametrize(
    ("losses", "rate", "sentence"),
    [
        (noisy(2.5, 2.49), 1e-5, "too low: set training.learning_rate: 0.001 and training.max_steps: 375"),
        (noisy(2.5, *(2.49,) * 8), 1e-5, "too low: set training.learning_rate: 0.001"),
        (noisy(0.7, 0.69, 0.7), 0.1, "at the rate 0.1, which is too high: set training.learning_rate: 0.001"),
        (noisy(0.7, 5.0, 0.9), 0.1, "did not stay low (0.7 to"),
        (noisy(0.7, 0.01, 0.7, 0.7), 1.5e-3, "so the rate 0.0015 is too high: set training.learning_rate: 0.0005"),
        (noisy(2.5, 2.49), 1e-3, "in 30 steps, which are too few: set training.max_steps: 375"),
        (noisy(2.5, 2.3), 1e-3, "fell little (2.5 to"),
        (noisy(4.3, 4.0, 3.0, 2.2, 2.15), 1e-3, "train longer, for example with training.max_steps: 360"),
        (noisy(4.3, 4.0, 3.0, 2.2, 2.15), 1e-4, "set training.learning_rate: 0.001"),
    ],
)
def test_the_rate_or_the_steps(losses: list[float], rate: float, sentence: str) -> None:
    run = make_classifier(losses, rate=rate)
    (sign,) = bad_signs(run)
    assert sentence in sign
    assert sign.count(": set ") + sign.count("train longer") == 1
    assert not any("sweep" in step or "longer" in step for step in after_training(run))
    page = run_report(run)
    assert next(section for section in page.sections if section.title == "What went badly").warnings == [
        f"{sign[0].upper()}{sign[1:]}."
    ]


def test_a_run_that_went_well_has_no_sign() -> None:
    plain = {"metric": "accuracy", "majority": 0.1, "words": 0.8, "label_rows": {"a": 300, "b": 290, "c": 1}}
    labels = table([("a", 0.9, 80), ("b", 0.8, 78), ("c", 0.0, 2)])  # two rows of c may be wrong by chance
    run = make_classifier(FELL, baselines=plain, classes=labels)
    run.evaluations[-1].part("eval")["accuracy"] = 0.78
    for losses in (FELL, noisy(2.5, 0.6, 0.4, 0.4), noisy(2.5, 0.02, 0.3, 0.02)):
        assert bad_signs(replace(run, steps=make_classifier(losses).steps)) == []
    unfinished = make_classifier(noisy(4.3, 4.0, 3.0, 2.2, 2.15), evaluations={0: 4.3, 60: 3.0, 120: 3.5})
    assert bad_signs(unfinished) == []  # more steps would overfit
    assert bad_signs(make_classifier(noisy(2.5, *(2.45,) * 20))) == []  # the cause is not known
    assert bad_signs(replace(run, report=Values())) == []


def scored(accuracy: float, confusion: list[list[int]], **plain: Any) -> RunValues:
    run = make_classifier(FELL, baselines={"metric": "accuracy", **plain}, classes={"confusion": confusion})
    values = [Values(record, eval={"loss": 1.0, "accuracy": accuracy}) for record in run.evaluations]
    return replace(run, evaluations=values)


def test_a_score_below_a_plain_baseline() -> None:
    right = [[60, 20], [20, 60]]
    (below,) = bad_signs(scored(0.75, right, majority=0.5, words=0.9))
    assert below == (
        "the accuracy 0.75 is below a plain baseline: a regression on the words has 0.9: tunekit sweep RECIPE --auto "
        "--minutes 10 tries other rates and numbers of steps"
    )
    assert bad_signs(scored(0.85, right, majority=0.5, words=0.9)) == []  # within its interval
    random = [[40, 40], [40, 40]]
    (shuffled,) = bad_signs(scored(0.5, random, majority=0.5, words=0.52))
    assert "no better than chance (0.5), and a regression on the words reaches 0.52: check that each label" in shuffled
    (learnable,) = bad_signs(scored(0.5, random, majority=0.5, words=0.9))
    assert learnable.startswith("the accuracy 0.5 is no better than chance (0.5): tunekit sweep RECIPE --auto")
    assert bad_signs(scored(0.92, [[140, 2], [10, 8]], majority=0.9, words=0.9)) == []  # rare labels are found
    slow = replace(scored(0.5, random, majority=0.5, words=0.52), steps=make_classifier(noisy(2.5, 2.49)).steps)
    steps, chance = bad_signs(slow)
    assert "too few" in steps
    assert chance == "the accuracy 0.5 is no better than chance (0.5)"  # one cure only
    numbers = make_classifier(FELL, evaluations={120: 0.5}, baselines={"metric": "loss", "majority": 0.3})
    assert bad_signs(numbers)[0].startswith("the squared error 0.5 is above that of the mean, 0.3: tunekit sweep")


def test_labels_that_are_never_right() -> None:
    labels = table([("a", 0.9, 80), ("b", 0.8, 76), ("c", 0.0, 3), ("d", 0.0, 1)])
    taught = {"a": 300, "b": 290, "c": 4}
    (few,) = bad_signs(make_classifier(FELL, classes=labels, baselines={"label_rows": taught}))
    assert few == (
        "labels that are never predicted right: c (4 training rows), d (0 training rows): add training rows of them"
    )
    (many,) = bad_signs(make_classifier(FELL, classes=labels, baselines={"label_rows": {**taught, "c": 90, "d": 90}}))
    assert many == "labels that are never predicted right: c: look at their rows with tunekit data rank RECIPE"


def test_truncated_rows() -> None:
    assert bad_signs(make_classifier(FELL, rows={"trained": 600, "truncated": 20})) == []
    (cut,) = bad_signs(make_classifier(FELL, rows={"trained": 600, "truncated": 120}))
    assert cut.startswith("120 of 600 training rows were truncated to data.max_length: 64: raise it")
