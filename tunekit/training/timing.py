"""Predicts the time of a sweep's trials from measurements: a few steps and evaluation batches of one trial."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from statistics import median

import torch

from tunekit.console.text import time_text
from tunekit.data.batching.steps import evaluation_batches
from tunekit.errors import NumericsError
from tunekit.evaluation.scores import summed_evaluation
from tunekit.machine.devices import deterministic_kernels
from tunekit.recipe.recipe import Recipe
from tunekit.records import Plan
from tunekit.training.begin import Load, assemble_run
from tunekit.training.halving import halving_seconds
from tunekit.training.run import Run
from tunekit.training.session import Planned, Session
from tunekit.training.trials import Trial

STEPS, BATCHES = 4, 4  # measured optimizer steps, the first of which is not counted, and evaluation batches


@dataclass(frozen=True)
class Costs:
    """Measured seconds. `load`: to load the base; `prepare`: to prepare a run with the loaded base; `token`: for a
    token in training; `evaluation`: for an evaluation with answers as long as the references; `first_evaluation`: for
    the evaluation before training, whose answers have another length."""

    load: float
    prepare: float
    token: float
    evaluation: float
    first_evaluation: float

    def of_steps(self, plan: Plan, recipe: Recipe, first: int, last: int) -> float:
        """Seconds of the steps from `first` to `last` and of the evaluations between them, including an evaluation
        before step 1."""
        evaluations = last // recipe.training.eval_steps - first // recipe.training.eval_steps
        evaluations += last == plan.steps and bool(last % recipe.training.eval_steps)
        before = self.first_evaluation if first == 0 and recipe.evaluation.before_training else 0.0
        return (last - first) * step_tokens(plan) * self.token + evaluations * self.evaluation + before

    def of_parts(self, plan: Plan, recipe: Recipe, ends: Sequence[int]) -> list[float]:
        """Seconds of each part of a run that pauses at the steps `ends`. After each pause, the run must be prepared
        again."""
        borders = [0, *ends, plan.steps]
        return [
            self.prepare + self.of_steps(plan, recipe, first, last) if last > first else 0.0
            for first, last in pairwise(borders)
        ]

    def of_run(self, plan: Plan, recipe: Recipe) -> float:
        """Seconds of a whole run with a base that is already loaded."""
        return self.prepare + self.of_steps(plan, recipe, 0, plan.steps)


def step_tokens(plan: Plan) -> float:
    """The mean number of tokens of a step, without padding."""
    per_epoch = plan.rows.steps_per_epoch
    return plan.rows.training.tokens / per_epoch if per_epoch else plan.supervised_tokens / plan.steps


def measure_costs(session: Session, plan: Plan, planned: Planned, load: Load) -> Costs | None:
    """Measure the costs of a run without writing any file. None if loss or gradient become non-finite at once.

    Raises: TunekitError if the run cannot be assembled.
    """
    session = replace(session, seconds={})
    torch.set_num_threads(plan.choice.threads or torch.get_num_threads())
    with deterministic_kernels(session.loaded.recipe.training.deterministic):
        base = load(session, plan, planned)
        started = time.monotonic()
        run = assemble_run(session, plan, planned, base, {})
        prepare = time.monotonic() - started
        try:
            tokens = _token_seconds(run)
        except NumericsError:
            return None
        first_evaluation, evaluation = _evaluation_seconds(run)
    return Costs(session.seconds.get("load", 0.0), prepare, median(tokens[1:] or tokens), evaluation, first_evaluation)


def _token_seconds(run: Run) -> list[float]:
    """The seconds for a token in each of the first steps. Raises: NumericsError."""
    seconds = []
    with run.model.training_mode(True):
        for step in islice(run.steps.after(0), STEPS):
            work = run.begin_step(step)
            [result] = run.engine.run([work])
            run.finish_step(work, result)
            run.settle()
            seconds.append((time.monotonic() - run.started) / max(run.counts[0], 1))
    return seconds


def _evaluation_seconds(run: Run) -> tuple[float, float]:
    """Seconds of an evaluation, estimated from some of its batches and one batch of generated answers: with answers of
    the model as it is, and with answers as long as the references."""
    rows, counts, evaluator = run.planned.rows.evaluation, run.plan.rows.evaluation, run.evaluator
    if rows is None or counts is None or evaluator is None:
        return 0.0, 0.0
    objective = run.objective.evaluation_copy()
    batches = islice(evaluation_batches(rows, objective.rows, batch_size=run.evaluation.batch_size), BATCHES)
    started = time.monotonic()
    sums = summed_evaluation(run.model, objective, batches, run.devices)
    of_rows = (time.monotonic() - started) * counts.tokens / max(sums.tokens, 1)
    now, trained = evaluator.query_seconds()
    return of_rows + now, of_rows + trained


@dataclass(frozen=True)
class TimeForecast:
    """The predicted time of a sweep, and of the same trials as separate `tunekit train` runs. Only trials with the same
    base as the measured trial are included. `start`: the seconds to start Python and load libraries."""

    costs: Costs
    measured: str  # the name of the measured trial
    start: float
    trials: Mapping[str, float]
    halved: float | None = None  # if each comparison of halving ends half of the trials
    gain: float = 1.0  # separate steps as a multiple of steps together, roughly estimated

    def lines(self) -> list[str]:
        """The prediction as text: the time of the sweep, and the time of separate runs."""
        count, one = len(self.trials), max(self.trials.values())
        separate = sum(self.trials.values())
        total = (separate if self.halved is None else self.halved) / self.gain
        alone = separate + count * (self.start + self.costs.load)
        halved = "" if self.halved is None else " if each comparison ends half of them"
        same = "" if self.gain > 1 else ". A step takes as long as in `tunekit train`"
        return [
            f"predicted time: {time_text(one)} for one trial, {time_text(total)} for {count} trials{halved}, "
            f"estimated from {STEPS} steps of {self.measured}",
            f"{count} separate runs of `tunekit train`: {time_text(alone)}; each would start Python "
            f"({self.start:.1f} s) and load the base ({self.costs.load:.1f} s){same}",
        ]


def forecast(
    trials: Sequence[Trial],
    measured: Trial,
    costs: Costs,
    start: float,
    ends: Sequence[Mapping[str, int | None]],
    gain: float,
) -> TimeForecast:
    """The predicted time of planned trials. `ends`: for each comparison of successive halving, the step of each trial.
    `gain`: how many times faster steps are if all trials run together."""
    planned_trials = [
        (trial.recipe.name, trial.plan, trial.recipe.loaded.recipe) for trial in trials if trial.plan is not None
    ]
    seconds_of = {name: costs.of_run(plan, recipe) for name, plan, recipe in planned_trials}
    halved = None
    if ends:
        parts = {
            name: costs.of_parts(plan, recipe, [end[name] or plan.steps for end in ends])
            for name, plan, recipe in planned_trials
        }
        halved = halving_seconds(parts)
    return TimeForecast(costs, measured.recipe.name, start, seconds_of, halved, gain)
