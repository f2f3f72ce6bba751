"""The training loop: gather a window, run the engine, clip, check, step, record; evaluate, save and stop when due.

Comes in: LoopParts, everything made by train.py, and a LoopState (fresh, or from a checkpoint).
Goes out: the final LoopState; records through the callbacks.  Next: train.py exports the adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from signal import Signals

import torch
from torch import Tensor

from tunekit.decisions import EvaluationRecord, StepRecord
from tunekit.errors import NumericsError, Stopped
from tunekit.protocols import Batch, Window
from tunekit.training.evaluation import EvaluationStopped
from tunekit.training.parts import LoopParts, LoopState

CLIPPING_EPSILON = 1e-6  # as in torch's clip_grad_norm_


def run_loop(parts: LoopParts, state: LoopState) -> LoopState:
    """Train from `state` to the last step. Raises: NumericsError, Stopped (after a checkpoint)."""
    with parts.model.training_mode(True):
        _evaluate_if_due(parts, state)  # a signal may have cut it short before the resume
        _stop_if_asked(parts, state, saved=True)
        if state.stopped_early:
            return state
        for window in parts.windows.windows(state.step):
            parts.record(_make_step(parts, state, window))
            saved_best = _evaluate_if_due(parts, state)
            last = state.step == parts.windows.steps or state.stopped_early
            saved = saved_best or last or state.step % parts.settings.save_steps == 0
            if saved:
                _save(parts, state)
            _stop_if_asked(parts, state, saved)
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


def _make_step(parts: LoopParts, state: LoopState, window: Window) -> StepRecord:
    """One optimizer step; state is advanced, and the step's record returned."""
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
    _check_finite(parts, window, loss, norm, state.step + 1)
    rate = parts.optimizer.step(parts.rate(state.updates), found_inf)
    finite = not bool(found_inf)
    parts.scale.update(finite, state.step + 1)
    _advance(parts, state, finite, loss, counts)
    seconds = time.monotonic() - started
    state.seconds["train"] = state.seconds.get("train", 0.0) + seconds
    tokens = int(counts[0])
    return StepRecord(
        step=state.step,
        epoch=window.epoch,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=tokens,
        supervised_tokens=int(counts[1]),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=parts.peak_bytes(),
    )


def _step_counts(parts: LoopParts, window: Window) -> tuple[Tensor, list[float]]:
    """The step's units (K,) over all ranks, and [tokens, supervised tokens, micro-batches]."""
    counts = [
        float(sum(batch.tokens for batch in window.batches)),
        float(sum(batch.supervised_tokens for batch in window.batches)),
        float(len(window.batches)),
    ]
    units = sum((parts.objective.units(batch) for batch in window.batches), torch.zeros(1, dtype=torch.float64))
    together = parts.devices.sum(torch.cat([torch.tensor(counts, dtype=torch.float64), units]))
    return together[3:], together[:3].tolist()


def _clip(parts: LoopParts, loss: Tensor) -> tuple[float, float, Tensor]:
    """Unscale, take the one norm of the whole step, clip by it. Returns loss, norm before clipping, found_inf ()."""
    if parts.scale.enabled:
        parts.optimizer.scale_gradients(1.0 / parts.scale.factor)
    norm = parts.optimizer.gradient_norm()  # () float32
    found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).to(torch.float32)
    if parts.settings.max_grad_norm is not None:
        factor = (parts.settings.max_grad_norm / (norm + CLIPPING_EPSILON)).clamp(max=1.0)
        parts.optimizer.scale_gradients(factor)
    return float(loss), float(norm), found_inf


def _check_finite(parts: LoopParts, window: Window, loss: float, norm: float, step: int) -> None:
    """Stop before the update where the numbers are wrong; only float16's overflow is the loss scale's business."""
    if math.isfinite(loss) and (math.isfinite(norm) or parts.scale.enabled):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    finite = [bool(torch.isfinite(value).all()) for value in parts.engine.losses]
    bad = [batch for batch, is_finite in zip(window.batches, finite, strict=True) if not is_finite]
    rows = parts.devices.gather(_rows_of(bad)) or parts.devices.gather(_rows_of(window.batches))
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    raise NumericsError(
        f"step {step}: the {what} is not finite; rows {', '.join(rows[:8])}{more}. No weight was changed by this step",
        "lower training.learning_rate, or look at these rows",
    )


def _rows_of(batches: Sequence[Batch]) -> list[str]:
    return [origin for batch in batches for origins in batch.origins for origin in origins]


def _advance(parts: LoopParts, state: LoopState, finite: bool, loss: float, counts: list[float]) -> None:
    state.step += 1
    state.updates += int(finite)
    state.loss = loss
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


def _stop_if_asked(parts: LoopParts, state: LoopState, saved: bool) -> None:
    number = parts.devices.any(parts.stop_signal())
    if not number:
        return
    if state.step and not saved:
        _save(parts, state)
    name = Signals(number).name
    if not state.step:
        raise Stopped(f"stopped by {name} before the first step; nothing was trained yet", number)
    raise Stopped(f"stopped by {name} after step {state.step}; the checkpoint is written, go on with --resume", number)
