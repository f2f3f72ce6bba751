"""Signs that a finished run went badly: a sentence for each cause, with the change that the measurements support."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Self

from tunekit.artifacts.report.values import RunValues
from tunekit.basics import NORMAL_95
from tunekit.errors import listed
from tunekit.metrics.classes import never_right
from tunekit.recipe.reading.first_values import usual_rate, usual_rows

RATE, WORDS = "training.learning_rate", "a regression on the words"
LEAST_STEPS = 4  # minimum of steps that are judged
FAR = 2.5  # times; a rate or a number of steps that is further from the usual one can be the cause
MOVED, ROSE, FELL, BACK, HIGH = 0.05, 0.1, 0.3, 0.9, 2.0  # shares of the loss at the start: see the rules
STILL, UNFINISHED, LEFT, WORSE, LOW_RATE, LONGER = 0.1, 0.3, 0.5, 0.02, 0.25, 3
CUT = 0.05  # share of truncated rows
LEAST_ROWS, FEW_ROWS, MOST_NAMED = 3, 10, 4  # evaluation rows of a label; its training rows; labels in a sentence


def bad_signs(run: RunValues) -> list[str]:
    """At most one sentence for each cause, most important first. Empty without a result, or if all is well."""
    if not run.report:
        return []
    training = rate_or_length(run)
    result = below_baseline(run, explained=training is not None)
    labels = labels_never_right(run, explained=(training or result) is not None)
    return [text for text in (training, result, labels, truncated_rows(run)) if text is not None]


@dataclass(frozen=True)
class LossPath:
    """How the training loss went. `start`: the loss of the first step, before any update; `tenths`: the mean over each
    tenth of the steps; `moved`: the mean over the first third minus that over the last; `deviation`: of a step."""

    start: float
    tenths: Sequence[float]
    moved: float
    deviation: float
    noise: float  # half the 95 % interval of `moved` if there is no trend

    @classmethod
    def of(cls, losses: Sequence[float]) -> Self:
        """The path of these losses. Noise is estimated as in `loss_is_flat`."""
        tenth, third = -(-len(losses) // 10), max(len(losses) // 3, 1)
        tenths = [fmean(losses[at : at + tenth]) for at in range(0, len(losses), tenth)]
        moved = fmean(losses[:third]) - fmean(losses[-third:])
        deviation = math.sqrt(fmean((after - before) ** 2 for before, after in pairwise(losses)) / 2)
        return cls(losses[0], tenths, moved, deviation, NORMAL_95 * deviation * math.sqrt(2 / third))

    @property
    def end(self) -> float:
        return self.tenths[-1]

    def __str__(self) -> str:
        return f"{self.start:.4g} to {self.end:.4g}"


def rate_or_length(run: RunValues) -> str | None:
    """The learning rate or the number of steps is the cause. Only for runs whose training loss shows how good they
    are."""
    losses = [loss for record in run.steps if (loss := record.number("loss")) is not None]
    rate = run.recipe.part("training").number("learning_rate")
    if not run.has_loss or len(losses) < LEAST_STEPS or not rate:
        return None
    path, usual = LossPath.of(losses), usual_rate(run.objective, _method(run))
    rules = (rate_is_too_high, loss_barely_moved, schedule_ended, steps_are_few)
    return next((text for rule in rules if (text := rule(run, path, rate, usual)) is not None), None)


def rate_is_too_high(run: RunValues, path: LossPath, rate: float, usual: float) -> str | None:
    """The loss ended above its start by the share ROSE and its noise. Or it was HIGH times its start, or had fallen by
    the share FELL, and ended near its start. Or the weights are worse than before, and the rate is above the usual."""
    highest, lowest = max(path.tenths), min(path.tenths)
    rose = path.end - path.start > max(ROSE * path.start, 2 * NORMAL_95 * path.deviation)
    returned = path.end > BACK * path.start and (highest > HIGH * path.start or lowest < (1 - FELL) * path.start)
    if not (rose or returned or ("verdict" in run.report and rate >= FAR * usual)):
        return None
    lower = f"{usual:g}" if rate >= FAR * usual else f"{rate / 3:.2g}"
    what = f"the training loss did not stay low ({path}, at best {lowest:.4g}, at worst {highest:.4g})"
    return f"{what}, so the rate {rate:g} is too high: set {RATE}: {lower}"


def loss_barely_moved(run: RunValues, path: LossPath, rate: float, usual: float) -> str | None:
    """The loss fell by less than its noise, or by less than the share MOVED, and the rate is far from the usual one."""
    far = rate >= FAR * usual or rate * FAR <= usual
    if not far or run.is_learned(path.end) or path.moved >= max(MOVED * path.start, path.noise):
        return None
    kind, longer = "high" if rate > usual else "low", _usual_steps(run) if rate < usual else None
    what = f"the training loss barely moved ({path}) at the rate {rate:g}, which is too {kind}"
    return f"{what}: set {RATE}: {usual:g}{f' and {longer}' if longer else ''}"


def steps_are_few(run: RunValues, path: LossPath, rate: float, usual: float) -> str | None:
    """The steps are far fewer than the measured number, the share LEFT of the loss is left, and the last evaluation is
    the best one."""
    longer = _usual_steps(run)
    if longer is None or path.end < LEFT * path.start or run.is_learned(path.end) or _overfits(run):
        return None
    return f"the training loss fell little ({path}) in {len(run.steps):,} steps, which are too few: set {longer}"


def _overfits(run: RunValues) -> bool:
    """Whether an evaluation before the last one has a loss that is lower by the share WORSE."""
    losses = [loss for _, loss in run.evaluation_losses]
    return bool(losses) and losses[-1] > (1 + WORSE) * min(losses)


def _usual_steps(run: RunValues) -> str | None:
    """The measured number of steps, as a key of the recipe; None if it is not known or the run has not far fewer."""
    labels, rows = run.report.part("classes").parts("per_class"), run.report.count("rows_per_step")
    needed = usual_rows(run.objective, _method(run), run.report.part("rows").count("trained"), len(labels))
    if not needed or not rows or len(run.steps) * rows * FAR > needed:
        return None
    return f"training.max_steps: {-(-needed // rows)}"


def schedule_ended(run: RunValues, path: LossPath, rate: float, usual: float) -> str | None:
    """The loss fell by the share STILL in the middle of the run, by less than half of that at its end, where the rate
    was below the share LOW_RATE of the highest, and the share UNFINISHED of the loss is left. The last evaluation is
    the best one."""
    ended = run.steps[-1].number("learning_rate")
    if len(path.tenths) < 10 or ended is None or ended > LOW_RATE * rate or _overfits(run):
        return None
    middle, last = path.tenths[3] - path.tenths[6], path.tenths[7] - path.end
    if path.end < UNFINISHED * path.start or middle < max(STILL * path.start, 2 * last):
        return None
    fell = f"the training loss still fell ({path.tenths[3]:.4g} to {path.tenths[6]:.4g}) when the schedule lowered the"
    fell += f" rate, and ended at {path.end:.4g}"
    if rate * FAR <= usual:
        return f"{fell}: set {RATE}: {usual:g}"
    training = run.recipe.part("training")
    key = "max_steps" if training.number("max_steps") is not None else "epochs"
    return f"{fell}: train longer, for example with training.{key}: {LONGER * (training.number(key) or 1):.9g}"


def below_baseline(run: RunValues, *, explained: bool) -> str | None:
    """The score on evaluation rows is below the best plain baseline, or no better than chance, beyond its 95 %
    interval. `explained`: a sentence about the training names the cure.

    Chance is the agreement of the predicted and the true labels if they were independent; Cohen 1960.
    """
    plain, values = run.report.part("baselines"), run.exported.part("eval")
    name, rows = str(plain.get("metric")), run.plan.part("rows").part("evaluation").count("trained")
    score, majority, words = values.number(name), plain.number("majority"), plain.number("words")
    if score is None or majority is None or not rows:
        return None
    cure = "" if explained else ": tunekit sweep RECIPE --auto --minutes 10 tries other rates and numbers of steps"
    if name == "loss":  # the squared error of numbers
        best, meaning = min(
            (majority, "the mean"), (majority if words is None else words, WORDS), key=lambda pair: pair[0]
        )
        below = score > best * (1 + NORMAL_95 * math.sqrt(2 / rows))
        return f"the squared error {score:.4g} is above that of {meaning}, {best:.4g}{cure}" if below else None
    best, meaning = max((majority, "always the most frequent label"), (words or 0.0, WORDS))
    reach = NORMAL_95 * math.sqrt(max(score * (1 - score), 1 / rows) / rows)
    chance = _chance(run)
    if chance is not None and score <= chance + reach:
        if words is not None and words <= majority + reach and not explained:
            cure = f", and {WORDS} reaches {words:.3g}: check that each label belongs to its row "
            cure += "(tunekit data rank RECIPE)"
        return f"the {name} {score:.3g} is no better than chance ({chance:.3g}){cure}"
    if score >= best - reach:
        return None
    return f"the {name} {score:.3g} is below a plain baseline: {meaning} has {best:.3g}{cure}"


def _chance(run: RunValues) -> float | None:
    """The expected share of right rows if predictions were independent of the labels; None without such counts."""
    facts = run.report.part("classes")
    lines = [[_number(value) for value in row] for row in facts.items_of("confusion") if isinstance(row, list)]
    rows = sum(map(sum, lines))
    if not rows:
        return None
    return sum(sum(line) * sum(other[at] for other in lines) for at, line in enumerate(lines)) / rows**2


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def labels_never_right(run: RunValues, *, explained: bool) -> str | None:
    """Labels whose F1 is 0 although the evaluation has LEAST_ROWS rows of them, or the training rows have none. Not if
    these are half of the labels, because then another sentence names the cause."""
    facts, taught = run.report.part("classes"), run.report.part("baselines").part("label_rows")
    lines = facts.parts("per_class")
    if not lines or any("f1" not in line for line in lines):
        return None
    wrong = set(never_right({"per_class": lines}))
    names = [
        str(line["label"])
        for line in lines
        if line["label"] in wrong
        and (line.count("rows") >= LEAST_ROWS or (taught and not taught.count(str(line["label"]))))
    ]
    if not names or (explained and 2 * len(names) >= len(lines)):
        return None
    few = [f"{name} ({taught.count(name)} training rows)" for name in names if taught and taught.count(name) < FEW_ROWS]
    if few:
        return f"labels that are never predicted right: {listed(few, MOST_NAMED)}: add training rows of them"
    what = f"labels that are never predicted right: {listed(names, MOST_NAMED)}"
    return what if explained else f"{what}: look at their rows with tunekit data rank RECIPE"


def truncated_rows(run: RunValues) -> str | None:
    """At least the share CUT of the training rows was truncated."""
    rows, length = run.report.part("rows"), run.recipe.part("data").count("max_length")
    cut, trained = rows.count("truncated"), rows.count("trained")
    if not cut or cut < CUT * trained:
        return None
    more = "raise it, up to the number of positions of the base, or shorten the texts"
    return f"{cut:,} of {trained:,} training rows were truncated to data.max_length: {length:,}: {more}"


def _method(run: RunValues) -> str:
    return str(run.recipe.part("adapter").get("method"))
