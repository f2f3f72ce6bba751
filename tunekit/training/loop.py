"""The training loop. Each step runs the engine, clips and checks gradients, updates weights and records numbers. The
loop also evaluates, saves and stops when necessary.

On a GPU, a step's loss and norm are read one step later, so that the host never waits for them. Until then, the device
itself skips a non-finite update.
"""

import math
import time
from collections.abc import Generator
from dataclasses import replace
from signal import Signals

import torch
from torch import Tensor

from tunekit.contracts import Window
from tunekit.errors import InputError, Problem, Stopped
from tunekit.evaluation.scores import EvaluationStopped
from tunekit.records import EvaluationRecord
from tunekit.training.divergence import watch_step
from tunekit.training.engines.window import LoopSteps, WindowRequest, WindowResult, run_alone
from tunekit.training.pace import measured, watch_pace
from tunekit.training.reached import reaching_all
from tunekit.training.readings import PendingReadings, Reading, check_finite, means, start_reading
from tunekit.training.state import Run, add_seconds, timed

CLIPPING_EPSILON = 1e-6  # as in torch's clip_grad_norm_


def run_loop(run: Run) -> None:
    """Train from the run's current state to the last step. Raises: NumericsError; Stopped or InputError, after a
    checkpoint was saved."""
    run_alone(loop_steps(run))


def loop_steps(run: Run) -> LoopSteps:
    """The training loop as a generator: it yields each window (the micro-batches of one optimizer step) for the caller
    to run. So several runs can share a base."""
    state, pending = run.state, PendingReadings()
    try:
        yield from _make_steps(run, pending)
    except InputError as error:
        if run.devices.world > 1:  # another rank may be in the middle of a step
            raise
        _settle(run, pending)
        if state.step > state.saved_step and run.can_resume:
            _save(run)
        if not state.saved_step:
            raise
        saved = Problem(f"the checkpoint of step {state.saved_step} is written", error.resume_advice)
        raise InputError.of([*error.problems, saved]) from error


def _make_steps(run: Run, pending: PendingReadings) -> LoopSteps:
    state, evaluated = run.state, run.state.evaluated_step
    with run.model.training_mode(True):
        _evaluate_if_due(run)  # before training; a signal or an error may have interrupted it before the resume
        if state.evaluated_step > max(evaluated, 0):  # this step's checkpoint lacks the results
            _save(run)
        _stop_if_asked(run, pending)
        if state.stopped_early:
            return
        run.starting(state.step + 1)
        for window in run.windows.windows(state.step):
            reading = yield from _make_step(run, window)
            _settle(run, pending)  # the previous step, whose numbers arrived while this one was queued
            pending.readings.append(reading)
            if not run.reads_later or _pauses(run):
                _settle(run, pending)
            watch_pace(run, state.step)
            saved_best = _evaluate_if_due(run)
            last = state.step == run.windows.steps or state.stopped_early
            if saved_best or last or state.step % run.training.save_steps == 0:
                _save(run)
            _stop_if_asked(run, pending)
            if last:
                break


def _make_step(run: Run, window: Window) -> Generator[WindowRequest, WindowResult, Reading]:
    """Make one optimizer step, update the state, and start to copy the step's numbers to the host."""
    state, started = run.state, time.monotonic()
    window = run.prepare_step(window)
    units, counts = _step_counts(run, window)
    run.optimizer.zero_gradients()
    run.engine.loss_scale = state.scale.factor
    with measured(run), reaching_all(run.adapter, run.devices, state.step == state.saved_step):
        total, sums = yield WindowRequest(run.engine, run.model, run.objective, window, units, int(counts[2]))
    missing = run.devices.missing(int(counts[2]), len(window.batches))
    if missing and run.spare is not None:
        run.engine.make_up(run.model, run.objective, run.spare, missing)
    run.adapter.after_backward()
    run.devices.sum_in_place(run.optimizer.gradients())
    loss, norm, found_inf = _clip(run, run.devices.sum(total).sum())
    numbers = {"loss": loss, "norm": norm, **means(run.objective.loss.logged, sums, units, run.devices)}
    reading, finite = start_reading(state.step + 1, window, run.engine.losses, counts, numbers, started), True
    if not run.reads_later:
        check_finite(reading, *reading.read(), run.devices, may_overflow=state.scale.enabled)
        finite = math.isfinite(reading.read()[1])
    reading.rate = run.optimizer.step(run.rate(), found_inf)
    state.scale.update(finite, reading.step)
    _advance(run, finite, counts)
    reading.sent = time.monotonic()
    return reading


def _settle(run: Run, pending: PendingReadings) -> None:
    """Wait for the numbers of pending steps, check them and record them. Raises: NumericsError."""
    state = run.state
    for reading in pending.readings:
        loss, norm, seconds = pending.read(reading)
        check_finite(reading, loss, norm, run.devices, may_overflow=state.scale.enabled)
        watch_step(run, reading, loss)
        add_seconds(state.seconds, reading.spent(seconds))
        record = reading.record(loss, norm, seconds, run.peak_bytes(), shown=run.shows_samples(reading.step))
        run.record(replace(record, threads=torch.get_num_threads()) if run.adapts_threads else record)
    pending.readings.clear()


def _pauses(run: Run) -> bool:
    """Whether this step's numbers are needed at once, because an evaluation or a checkpoint follows or the run ends."""
    step, settings = run.state.step, run.training
    last, evaluates = step == run.windows.steps, run.evaluate is not None and step % settings.eval_steps == 0
    return last or evaluates or step % settings.save_steps == 0


def _step_counts(run: Run, window: Window) -> tuple[Tensor, list[float]]:
    """The step's number of loss units (K,), and its numbers of tokens, supervised tokens and micro-batches. All are
    summed over ranks."""
    batches = window.batches
    counts = [sum(batch.tokens for batch in batches), sum(batch.supervised for batch in batches), len(batches)]
    units = sum(map(run.objective.loss.units, batches), torch.zeros(1, dtype=torch.float64))
    together = run.devices.sum(torch.cat([torch.tensor(counts, dtype=torch.float64), units]))
    return together[3:], together[:3].tolist()


def _clip(run: Run, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unscale the gradients and clip them by their norm. Returns the loss, the norm before clipping, and found_inf;
    each has shape ()."""
    if run.state.scale.enabled:
        run.optimizer.scale_gradients(1.0 / run.state.scale.factor)
    norm = run.optimizer.gradient_norm()  # () float32
    found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).to(torch.float32)
    if run.training.max_grad_norm is not None:
        factor = (run.training.max_grad_norm / (norm + CLIPPING_EPSILON)).clamp(max=1.0)
        run.optimizer.scale_gradients(factor)
    return loss, norm, found_inf


def _advance(run: Run, finite: bool, counts: list[float]) -> None:
    state = run.state
    state.step += 1
    state.updates += int(finite)
    state.tokens += int(counts[0])
    state.supervised_tokens += int(counts[1])
    if finite:
        run.adapter.after_step(state.step - 1, run.windows.steps)


def _evaluate_if_due(run: Run) -> bool:
    """Evaluate before training, at every multiple of eval_steps and at the end. Returns whether this evaluation is the
    best so far, so that a checkpoint must be saved. The evaluation before training is only a reference."""
    state, settings = run.state, run.evaluation
    due = state.step % run.training.eval_steps == 0 or state.step == run.windows.steps
    due = due if state.step else settings.before_training
    if run.evaluate is None or not due or state.step <= state.evaluated_step:
        return False
    try:
        with timed(state.seconds, "evaluate"):
            evaluation = run.evaluate()
    except EvaluationStopped:
        return False
    state.evaluated_step, state.measured_facts = state.step, dict(evaluation.facts)
    values = evaluation.metrics, evaluation.classes, evaluation.samples, evaluation.sources
    run.record(EvaluationRecord(state.step, *values))
    run.keep_pictures(state.step, evaluation)
    better = state.judge(settings, evaluation.metrics)
    if better or settings.best is None or not state.step:
        run.keep_rows(state.step, evaluation)
    return better and settings.best is not None


def _save(run: Run) -> None:
    run.state.saved_step = run.state.step
    with timed(run.state.seconds, "save"):
        run.save()


def _stop_if_asked(run: Run, pending: PendingReadings) -> None:
    """If a signal requested a stop, save a checkpoint and end the run. Raises: Stopped."""
    number, step = run.devices.any(run.stop_signal()), run.state.step
    if not number or not run.can_resume:
        return
    _settle(run, pending)
    if step > run.state.saved_step:
        _save(run)
    ended = f"after step {step}; the checkpoint is written; continue with --resume"
    ended = ended if step else "before the first step; nothing was trained yet"
    raise Stopped(f"stopped by {Signals(number).name} {ended}", number)
