"""Advice after a command: sentences that say what to do next. Each rule reads facts that a command recorded. It returns
a sentence, or None if its condition is false. A rule's docstring states the condition."""

import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np

from tunekit.artifacts.report.bad_signs import bad_signs
from tunekit.artifacts.report.paired import Losses, different_rows, ratio_error
from tunekit.artifacts.report.values import LEARNED, RunValues
from tunekit.basics import NORMAL_95, student
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.reading.names import objective_class
from tunekit.records import Plan, bytes_text

MOST = 2  # maximum of sentences after a command
CHANGE = 0.01  # share of a loss; a smaller change does not count
LEAST_STEPS = 12  # minimum of steps that show a trend
TIMES = 3.0  # factor between learning rates to try
WIDE = 0.1  # share of the change by training; a wider interval hides differences between recipes
CLIPPED = 0.5  # share of the steps
AFTER_VERDICT = "lower training.learning_rate, train for fewer steps, or check the rows"


def after_training(run: RunValues) -> list[str]:
    """The next steps after a finished run, most important first. For a run with a bad verdict, only AFTER_VERDICT. If
    the run has bad signs, their sentences name what to change in training, so that no rule contradicts them."""
    signs = bad_signs(run)
    if not run.report or "verdict" in run.report:
        return [AFTER_VERDICT] if run.report and not signs else []
    rules = AFTER_TRAINING[len(ABOUT_LOSSES) :] if signs else AFTER_TRAINING
    return [text for rule in rules if (text := rule(run)) is not None][:MOST]


def learned_at_once(run: RunValues) -> str | None:
    """The loss is almost 0 before the first update, or an accuracy is 1 before half an epoch. Possible reasons: the
    prompt contains the answer, evaluation rows are training rows, or the base already knows the answers.

    Source: the loss of a model that must guess among K equally likely answers is ln K; Karpathy 2019, A recipe for
    training neural networks (check the loss at the start). Leaks: Lee et al. 2022, section 5.
    """
    loss = run.steps[0].number("loss") if run.steps and run.has_loss and run.is_log_loss else None
    if loss is not None and 0 <= loss < LEARNED:
        return (
            f"the training loss was {loss:.2g} already at step 1: check with tunekit preview that the prompt does not "
            "contain the answer"
        )
    half = run.plan.part("rows").count("steps_per_epoch") / 2
    first = next((record for record in run.evaluations if record.part("eval").number("accuracy") == 1.0), None)
    if first is None or first.count("step") > half:
        return None
    check = "data check that no training row equals an evaluation row"
    if not first.count("step"):  # before training, equal rows do not matter
        check = "preview that the prompt does not contain the answer"
    return (
        f"the accuracy on evaluation rows was 1.0 already at step {first.count('step'):,}: check with tunekit {check}"
    )


def evaluation_rises(run: RunValues) -> str | None:
    """The last evaluation loss is above the lowest evaluation loss by more than the share CHANGE, while the training
    loss continued to fall and is not flat. Not for a run whose exported step another metric chose.

    Source: the generalisation loss GL(t) = E(t) / min E - 1; Prechelt 1998, Early stopping - but when?, section 2.
    """
    losses, evaluation = run.evaluation_losses, run.recipe.part("evaluation")
    if len(losses) < 3 or evaluation.get("best") not in (None, "eval.loss"):
        return None
    (best, lowest), (last, loss) = min(losses, key=lambda pair: pair[1]), losses[-1]
    if best in (0, last) or loss <= (1 + CHANGE) * lowest or not _training_fell(run, best) or loss_is_flat(run):
        return None
    rise = (
        f"the evaluation loss has risen since step {best:,} ({lowest:.4g} to {loss:.4g}), but the training loss falls"
    )
    per_epoch = run.plan.part("rows").count("steps_per_epoch")
    by_epochs = per_epoch and run.recipe.part("training").number("max_steps") is None
    shorter = f"training.epochs: {best / per_epoch:.4g}" if by_epochs else f"training.max_steps: {best}"
    if evaluation.get("best") == "eval.loss":
        patience = "" if evaluation.get("patience") else "evaluation.patience or "
        return f"{rise}: to end a run there, set {patience}{shorter}"
    return f"{rise}: to export step {best:,}, set evaluation.best: eval.loss; to end a run there, set {shorter}"


def evaluation_falls(run: RunValues) -> str | None:
    """The evaluation loss fell twice in a row, the last time by more than the share CHANGE. No other metric stopped the
    run early, and none was better at an earlier step, which was exported.

    Source: Prechelt 1998, section 2: training continues while the validation error falls.
    """
    losses = run.evaluation_losses
    stopped_early = run.report.count("final_step") < run.plan.count("steps")
    if len(losses) < 3 or stopped_early or run.is_learned(losses[-1][1]):
        return None
    if run.report.get("best_step", losses[-1][0]) != losses[-1][0]:
        return None
    (_, earlier), (before, loss), (last, final) = losses[-3:]
    if not earlier > loss > final or final > (1 - CHANGE) * loss:
        return None
    training = run.recipe.part("training")
    key = "max_steps" if training.number("max_steps") is not None else "epochs"
    length = training.number(key)
    longer = "" if length is None else f", for example with training.{key}: {2 * length:.9g}"
    return (
        f"the evaluation loss still falls ({loss:.4g} to {final:.4g} in the last {last - before:,} steps): train "
        f"longer{longer}"
    )


def loss_is_flat(run: RunValues) -> str | None:
    """The mean training loss of the last third of the steps is about equal to the mean of the first third: their
    difference is below the noise, and the loss fell by less than the share CHANGE. Not if nothing is left to learn. If
    most gradients were clipped, the sentence names a lower learning rate first.

    Source: noise is estimated from successive differences, variance = mean((x[t+1] - x[t])^2) / 2; von Neumann 1941.
    Rates at factors of about 3: Bengio 2012, section 3.1 (a rate 3 times smaller).
    """
    losses = [value for record in run.steps if (value := record.number("loss")) is not None]
    rate, third = run.recipe.part("training").number("learning_rate"), len(losses) // 3
    if not run.has_loss or len(losses) < LEAST_STEPS or not rate:
        return None
    first, last = fmean(losses[:third]), fmean(losses[-third:])
    variance = fmean((after - before) ** 2 for before, after in pairwise(losses)) / 2
    noise = NORMAL_95 * math.sqrt(2 * variance / third)
    if abs(last - first) > noise or first - last > CHANGE * abs(first) or run.is_learned(last):
        return None
    rates = [rate * TIMES, rate / TIMES]
    limit, norms = run.recipe.part("training").number("max_grad_norm"), _norms(run)
    clipped = sum(norm > limit for norm in norms) / len(norms) if limit and norms else 0.0
    why = f"; gradients were clipped in {clipped:.0%} of the steps" if clipped > CLIPPED else ""
    tried = ",".join(f"{each:.2g}" for each in (rates[::-1] if why else rates))
    return (
        f"the training loss is flat ({first:.4g} to {last:.4g}){why}: compare other learning rates with tunekit "
        f"sweep and training.learning_rate={tried}"
    )


def rows_are_few(run: RunValues) -> str | None:
    """The confidence interval of the evaluation loss is wide, compared with the change of the loss in training.

    Source: Miller 2024, Adding error bars to evals, sections 2 and 4 (compare in pairs).
    """
    rows = run.row_losses
    losses, units, before = (_array(rows.column(name)) for name in ("losses", "units", "before"))
    digests = rows.items_of("digests")
    if losses is None or units is None or not len(digests) == len(losses) == len(units):
        return None
    change = None if before is None or len(before) != len(losses) else abs((before - losses).sum() / units.sum())
    return few_rows(digests, losses, units, change)


def few_rows(digests: Sequence[object], losses: Losses, units: Losses, change: float | None = None) -> str | None:
    """A sentence about the noise of a loss; None if its 95 % interval is narrow compared with `change`, or without
    `change`, with the loss.

    Shapes: (rows,) each. `digests`: equal for the copies of a row, which count as one row. `losses`: the sum over each
    row's units.    Source: see `ratio_error`.
    """
    if not units.sum():
        return None
    different = different_rows(digests, np.stack([losses, units], axis=1))
    if len(different) < 2:
        return "one evaluation row does not show how uncertain the loss is: evaluate more rows"
    loss, reach = abs(losses.sum() / units.sum()), student(len(different) - 1) * ratio_error(*different.T)
    if not reach > WIDE * (loss if change is None else change):
        return None
    return (
        f"with {len(different):,} different evaluation rows, the loss is uncertain by ± {reach:.2g}; to see a "
        "smaller difference between two runs, compare them row by row: tunekit report RUN RUN"
    )


def memory_is_left(run: RunValues) -> str | None:
    """On an accelerator, micro-batches of twice the size would fit into the memory budget. With half the gradient
    accumulation, the optimizer steps are the same, but fewer kernels are launched.

    Source: peak + activations + logits, because only these two grow with the micro-batch.
    """
    choice, parts, budget = run.plan.part("choice"), run.plan.numbers("peak_bytes"), run.plan.number("budget_bytes")
    rows, windows = choice.count("micro_batch_size"), choice.count("gradient_accumulation_steps")
    measured = max(run.report.numbers("measured_bytes").values(), default=0.0)
    if budget is None or run.plan.get("device") == "cpu" or not rows or not measured:
        return None
    if not windows or windows % 2:  # then no half would make the same steps
        return None
    needed = measured + parts.get("activations", 0.0) + parts.get("logits", 0.0)
    if needed > budget:
        return None
    return (
        f"{bytes_text(budget - measured)} of the budget was free: to make the same steps faster, set "
        f"training.micro_batch_size: {2 * rows} and training.gradient_accumulation_steps: {windows // 2}"
    )


def nothing_measured(run: RunValues) -> str | None:
    """There are no evaluation rows.

    Source: the loss of training rows does not show whether a model generalises; Hastie et al. 2009, The elements of
    statistical learning, section 7.2.
    """
    rows = run.plan.part("rows").part("training")
    streamed = rows.get("estimated") is True
    return None if run.evaluations else _without_evaluation(run.objective, rows.count("trained"), streamed)


def _without_evaluation(objective: type[ObjectiveSettings], rows: int, streamed: bool) -> str:
    """The sentence for a recipe without evaluation rows. `rows`: the number of training rows."""
    how = "set data.eval: 0.1 to evaluate on a tenth of the rows"
    if objective.measures_training:
        how = "set data.eval to the path of data.train, because this objective is evaluated on its training rows"
    elif streamed or rows == 1:
        how = "name a file in data.eval, because no share of these rows can be held out"
    return f"no evaluation rows measure the result: {how}"


ABOUT_LOSSES = (learned_at_once, evaluation_rises, evaluation_falls, loss_is_flat)
AFTER_TRAINING = (*ABOUT_LOSSES, rows_are_few, nothing_measured, memory_is_left)


def after_plan(
    plan: Plan, recipe: Path, *, overrides: Sequence[str], ranks: int = 1, device: str | None = None
) -> list[str]:
    """The next steps after `tunekit plan`; empty if the plan has refusals, because these contain advice. `overrides`:
    the changes of the recipe on the command line. `ranks`: the number of planned processes. `device`: --device."""
    if plan.refusals:
        return []
    program = "tunekit" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m tunekit"
    options = [] if device is None else ["--device", device]
    train = f"{program} train {shlex.join([str(recipe), *overrides, *options])}"
    if plan.rows.evaluation is not None:
        return [train]
    rows = plan.rows.training
    return [_without_evaluation(objective_class(plan.objective), rows.trained, rows.estimated), train]


CURES = {  # kind of finding -> what to do, most important first
    "secret": "remove the secrets from these rows, and revoke them: a model can repeat what it was trained on",
    "leak": "remove training rows that equal evaluation rows, because they make the evaluation loss too low",
    "broken": "correct the rows that cannot be read",
    "contrary": "give rows with the same input the same label",
    "long": "raise data.max_length, or set data.excess_length: truncate or split",
}


def after_data_check(
    findings: Sequence[Mapping[str, Sequence[int]]], recipe: Path, *, overrides: Sequence[str] = (), fixes: bool
) -> list[str]:
    """The next steps after a data check. `findings`: for each file, the line numbers of rows by kind of finding.
    `overrides`: the changes of the recipe on the command line. `fixes`: whether --fix would leave out any training
    rows.

    Source: secrets, Carlini et al. 2021, Extracting training data; leaks, Lee et al. 2022, section 5; labels, Northcutt
    et al. 2021, Pervasive label errors.
    """
    kinds = {kind for each in findings for kind, lines in each.items() if lines}
    if not kinds:
        return [f"tunekit preview {shlex.join([str(recipe), *overrides])} shows what the model is trained on"]
    cures = [cure for kind, cure in CURES.items() if kind in kinds][:1]
    if not fixes:
        return cures or ["correct the rows with findings, or remove them"]
    return [*cures, "--fix FILE writes the training rows without findings"]


def after_evaluation(
    target: str,
    kind: str,
    digests: Sequence[object],
    losses: Losses,
    units: Losses,
    *,
    changes: Sequence[str] = (),
) -> list[str]:
    """The next steps after an evaluation: a sentence about the noise of the loss, then the next command. `kind`:
    recipe, run, adapter or model. `changes`: the changes of a recipe on the command line.

    Shapes: `digests`, `losses` and `units` (rows,) each, empty if losses were not measured.
    """
    noise = few_rows(digests, losses, units)
    commands = {
        "recipe": f"tunekit train {shlex.join([target, *changes])}, then evaluate its run on the same rows",
        "run": f"tunekit report {shlex.quote(target)} shows the rows with the highest loss",
    }
    return [*([] if noise is None else [noise]), *([commands[kind]] if kind in commands else [])]


def _training_fell(run: RunValues, step: int) -> bool:
    """Whether the mean training loss after `step` is lower than the mean over the same number of steps before."""
    pairs = [(each.count("step"), loss) for each in run.steps if (loss := each.number("loss")) is not None]
    after = [loss for at, loss in pairs if at > step]
    before = [loss for at, loss in pairs if at <= step][-len(after) :]
    return bool(after and before) and fmean(after) < fmean(before)


def _norms(run: RunValues) -> list[float]:
    return [norm for record in run.steps if (norm := record.number("grad_norm")) is not None]


def _array(values: Sequence[float | None]) -> Losses | None:
    """The values (rows,); None if there are no values, or if one is missing."""
    present = [value for value in values if value is not None]
    return np.array(present, np.float64) if present and len(present) == len(values) else None
