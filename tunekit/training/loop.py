"""The training loop: gather a window, run the engine, clip, check, step, record; evaluate, save and stop when due.

Comes in: LoopParts, everything made by train.py, and a LoopState (fresh, or from a checkpoint).
On a GPU no step waits for its own numbers: they are read one step later, and the update itself is gated on them.
Goes out: the final LoopState; records through the callbacks.  Next: train.py exports the adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

import torch
from torch import Tensor

from tunekit.contracts import Window
from tunekit.errors import Stopped
from tunekit.records import EvaluationRecord, StepRecord
from tunekit.training.readings import Reading, Waiting, check_finite, start_reading
from tunekit.training.state import LoopParts, LoopState
from tunekit.tuned.scores import EvaluationStopped

CLIPPING_EPSILON = 1e-6  # as in torch's clip_grad_norm_


def run_loop(parts: LoopParts, state: LoopState) -> LoopState:
    """Train from `state` to the last step. Raises: NumericsError, Stopped (after a checkpoint)."""
    with parts.model.training_mode(True):
        _evaluate_if_due(parts, state)  # a signal may have cut it short before the resume
        waiting = Waiting()
        _stop_if_asked(parts, state, True, waiting)
        if state.stopped_early:
            return state
        for window in parts.windows.windows(state.step):
            reading = _make_step(parts, state, window)
            _settle(parts, state, waiting)  # the step before: its numbers came while this one was sent off
            waiting.readings.append(reading)
            if not parts.reads_later or _pauses(parts, state):
                _settle(parts, state, waiting)
            saved_best = _evaluate_if_due(parts, state)
            last = state.step == parts.windows.steps or state.stopped_early
            saved = saved_best or last or state.step % parts.settings.save_steps == 0
            if saved:
                _save(parts, state)
            _stop_if_asked(parts, state, saved, waiting)
            if last:
                break
    return state


@contextmanager
def _timed(state: LoopState, part: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        state.seconds[part] = state.seconds.get(part, 0.0) + time.monotonic() - started


def _make_step(parts: LoopParts, state: LoopState, window: Window) -> Reading:
    """One optimizer step; state is advanced, and the step's numbers are on their way."""
    started = time.monotonic()
    window = parts.objective.prepare(parts.model, window)
    units, counts = _step_counts(parts, window)
    parts.optimizer.zero_gradients()
    parts.engine.loss_scale = parts.scale.factor
    total, _ = parts.engine.run_window(parts.model, parts.objective, window, units, int(counts[2]))
    if parts.model.adapter is not None:
        parts.model.adapter.after_backward()
    parts.devices.sum_in_place(parts.optimizer.gradients())
    loss, norm, found_inf = _clip(parts, parts.devices.sum(total).sum())
    reading = start_reading(state.step + 1, window, parts.engine.losses, counts, loss, norm)
    reading.started, finite = started, True
    if not parts.reads_later:
        numbers = reading.read()
        check_finite(reading, *numbers, parts.devices, may_overflow=parts.scale.enabled)
        finite = math.isfinite(numbers[1])
    reading.rate = parts.optimizer.step(parts.rate(state.updates), found_inf)
    parts.scale.update(finite, reading.step)
    _advance(parts, state, finite, counts)
    return reading


def _settle(parts: LoopParts, state: LoopState, waiting: Waiting) -> None:
    """Wait for the numbers of the steps that were sent off, check and record them. Raises: NumericsError."""
    for reading in waiting.readings:
        loss, norm = reading.read()
        check_finite(reading, loss, norm, parts.devices, may_overflow=parts.scale.enabled)
        now = time.monotonic()
        seconds = now - max(reading.started, waiting.settled)  # of a step that began before the last one was read
        waiting.settled, state.loss = now, loss
        state.seconds["train"] = state.seconds.get("train", 0.0) + seconds
        tokens = int(reading.counts[0])
        record = StepRecord(
            step=reading.step,
            epoch=reading.window.epoch,
            loss=loss,
            learning_rate=reading.rate,
            grad_norm=norm,
            tokens=tokens,
            supervised_tokens=int(reading.counts[1]),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_bytes=parts.peak_bytes(),
        )
        parts.record(record)
    waiting.readings.clear()


def _pauses(parts: LoopParts, state: LoopState) -> bool:
    """Whether something follows this step that must know its numbers: an evaluation, a checkpoint, the end."""
    settings, last = parts.settings, state.step == parts.windows.steps
    evaluates = parts.evaluate is not None and state.step % settings.eval_steps == 0
    return last or evaluates or state.step % settings.save_steps == 0


def _step_counts(parts: LoopParts, window: Window) -> tuple[Tensor, list[float]]:
    """The step's units (K,) over all ranks, and [tokens, supervised tokens, micro-batches]."""
    counts = [
        float(sum(batch.tokens for batch in window.batches)),
        float(sum(batch.supervised for batch in window.batches)),
        float(len(window.batches)),
    ]
    units = sum((parts.objective.units(batch) for batch in window.batches), torch.zeros(1, dtype=torch.float64))
    together = parts.devices.sum(torch.cat([torch.tensor(counts, dtype=torch.float64), units]))
    return together[3:], together[:3].tolist()


def _clip(parts: LoopParts, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unscale, take the one norm of the whole step, clip by it: loss, norm before clipping, found_inf; () each."""
    if parts.scale.enabled:
        parts.optimizer.scale_gradients(1.0 / parts.scale.factor)
    norm = parts.optimizer.gradient_norm()  # () float32
    found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).to(torch.float32)
    if parts.settings.max_grad_norm is not None:
        factor = (parts.settings.max_grad_norm / (norm + CLIPPING_EPSILON)).clamp(max=1.0)
        parts.optimizer.scale_gradients(factor)
    return loss, norm, found_inf


def _advance(parts: LoopParts, state: LoopState, finite: bool, counts: list[float]) -> None:
    state.step += 1
    state.updates += int(finite)
    state.tokens += int(counts[0])
    state.supervised_tokens += int(counts[1])
    state.loss_scale, state.good_steps = parts.scale.scale, parts.scale.good_steps
    state.skipped_steps = parts.scale.skipped_steps
    if finite and parts.model.adapter is not None:
        parts.model.adapter.after_step(state.step - 1, parts.windows.steps)


def _evaluate_if_due(parts: LoopParts, state: LoopState) -> bool:
    """Evaluate at every eval_steps and at the end; returns whether this is the best state so far."""
    due = state.step % parts.settings.eval_steps == 0 or state.step == parts.windows.steps
    if parts.evaluate is None or not due or state.step <= state.evaluated_step:
        return False
    try:
        with _timed(state, "evaluate"):
            metrics = parts.evaluate()
    except EvaluationStopped:
        return False
    state.evaluated_step = state.step
    parts.record(EvaluationRecord(state.step, metrics))
    if parts.watched_metric is None:
        return False
    value = metrics[parts.watched_metric]
    if parts.is_better(value, state.best_value):
        state.best_step, state.best_value, state.evaluations_without_gain = state.step, value, 0
        return parts.saves_best
    state.evaluations_without_gain += 1
    state.stopped_early = parts.patience is not None and state.evaluations_without_gain >= parts.patience
    return False


def _save(parts: LoopParts, state: LoopState) -> None:
    with _timed(state, "save"):
        parts.save(state)


def _stop_if_asked(parts: LoopParts, state: LoopState, saved: bool, waiting: Waiting) -> None:
    number = parts.devices.any(parts.stop_signal())
    if not number:
        return
    _settle(parts, state, waiting)
    if state.step and not saved:
        _save(parts, state)
    name = Signals(number).name
    if not state.step:
        raise Stopped(f"stopped by {name} before the first step; nothing was trained yet", number)
    raise Stopped(f"stopped by {name} after step {state.step}; the checkpoint is written, go on with --resume", number)
