"""Warnings about steps that go wrong: a loss above the run's own past, or samples that teach nothing; the report keeps
them."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import fmean, median, median_low, pstdev

from tunekit.records import Reaction
from tunekit.training.readings import Reading, rows_text
from tunekit.training.state import Run

PAST = 50  # steps before this one that are looked at
LEAST = 8  # of them, to distinguish a spike from noise
DEVIATIONS, SHARE = 6.0, 1.5  # a spike is this far above their mean
LAST = 5  # steps in a row that should be no worse than the first one, whose loss is that before any update
# A jump is JUMP times the steps just before, of which RECENT are looked at. Losses near zero jitter: it must also reach
# JUMP_FLOOR, or JUMP_SHARE of a small first loss.
JUMP, RECENT, JUMP_FLOOR, JUMP_SHARE = 50.0, 3, 0.1, 0.05
# A whole run ends worse by this many times its noise, and by this share; twice the first loss is never noise.
NOISES, LEAST_RISE, MOST_RISE, UNKNOWN_NOISE = 4.0, 0.1, 1.0, 0.6
KEEP_BEST = "evaluation.best: eval.loss exports the best evaluated step (training.eval_steps) instead of the last"


def watch_step(run: Run, reading: Reading, loss: float) -> None:
    """Look at a step's loss, unless another number says how good the model is; and at shares that should not stay 1."""
    if run.shows.headline.name == "loss":
        watch_loss(run, reading, loss)
    watch_stalls(run, reading)


def watch_loss(run: Run, reading: Reading, loss: float) -> None:
    """Compare a step's loss with those before it, and add it to them; the same on every rank."""
    state = run.state
    why = divergence(state.first_losses, state.past_losses, loss)
    if why is not None:
        rows = rows_text(reading.window.batches, run.devices)
        last = reading.step == run.windows.steps and run.evaluation.best is None
        outcome = f"this was the last step, and its weights are exported; {KEEP_BEST}" if last else "training continues"
        action = f"{outcome}; lower training.learning_rate, or look at the rows of this step: {rows}"
        state.reactions.append(asdict(Reaction(why, action, reading.step)))
        run.warn(f"step {reading.step}: {why}; {action}")
    state.first_losses = state.first_losses or [loss]
    state.past_losses = [*state.past_losses, loss][-PAST:]


def watch_stalls(run: Run, reading: Reading) -> None:
    """Warn if nothing could be learned in several steps in a row; of a single step once in a run. The same on every
    rank."""
    state, metrics = run.state, reading.window.preparation.metrics
    for stall in run.shows.stalled:
        count = state.useless_steps.get(stall.metric, 0) + 1 if metrics.get(stall.metric) == 1.0 else 0
        state.useless_steps[stall.metric] = count
        what = f"{stall.meaning} for {count} steps" if stall.steps > 1 else stall.meaning
        repeats = stall.steps == 1 and any(reaction["probe"] == what for reaction in state.reactions)
        if count == stall.steps and not repeats:
            state.reactions.append(asdict(Reaction(what, stall.action, reading.step)))
            run.warn(f"step {reading.step}: {what}; {stall.action}")


def divergence(first: Sequence[float], past: Sequence[float], loss: float) -> str | None:
    """Why this loss is above the run's own past, or None.

    `first`: the loss of the first step; `past`: those of the up to PAST steps before this one. A spike is more than
    SHARE times the mean of the past and more than DEVIATIONS of its standard deviations above it. A rise is LAST steps
    in a row of more than SHARE times the first loss, or of more than NOISES times the noise above it; it is reported
    when it starts. A jump is reported unless a past step rose as much, because then it is this run's noise.
    """
    if len(past) >= LEAST:
        mean, deviation = fmean(past), pstdev(past)
        if loss > SHARE * mean and loss > mean + DEVIATIONS * deviation:
            return f"the loss {loss:.4g} is far above that of the {len(past)} steps before ({mean:.4g} on average)"
    if not any(after > JUMP * before for before, after in pairwise(past)):
        why = jump(first, past, loss)
        if why is not None:
            return f"the loss {loss:.4g} is {why}"
    if len(past) >= LAST:
        limit = first[0] * max(SHARE, 1.0 + NOISES * _noise([*past, loss]))
        if past[-LAST] <= limit < min([*past[1 - LAST :], loss]):
            return f"the loss has been above {limit:.4g} for {LAST} steps, and training began at {first[0]:.4g}"
    return None


def jump(first: Sequence[float], past: Sequence[float], loss: float) -> str | None:
    """How many times worse this loss is than the steps just before, or None; it needs no long past, and does not count
    how high the loss was before it fell."""
    before = median_low(past[-RECENT:]) if past else 0.0
    if before <= 0 or loss < max(JUMP * before, min(JUMP_FLOOR, JUMP_SHARE * first[0])):
        return None
    return f"{loss / before:,.0f} times that of the steps just before ({before:.4g})"


def last_jump(losses: Sequence[float]) -> str | None:
    """The message for a run that ended on a jump, or None: its exported weights are those right after the jump."""
    why = jump(losses[:1], losses[:-1], losses[-1]) if losses else None
    return None if why is None else f"it ended on a spike: the loss {losses[-1]:.4g} of the last step is {why}"


def rise(losses: Sequence[float]) -> str | None:
    """The message for a run that ended worse than it began, or None; for runs that nothing else compares with the base.

    The mean of the last tenth of the steps is compared with the loss of the first step, which is that before any
    update: worse by more than LEAST_RISE of it, and by more than NOISES times the noise, which few steps do not show:
    at least UNKNOWN_NOISE / sqrt(steps). The jumps of a run that diverged look like noise: worse by MOST_RISE always
    counts.
    """
    if len(losses) < 2 or losses[0] <= 0:
        return None
    tenth = -(-len(losses) // 10)
    final, noise = fmean(losses[-tenth:]), max(_noise(losses), UNKNOWN_NOISE / math.sqrt(len(losses)))
    if final <= losses[0] * (1.0 + min(max(LEAST_RISE, NOISES * noise), MOST_RISE)):
        return None
    return f"worse than it began: training loss {final:.4g} over the last tenth of the steps, {losses[0]:.4g} at step 1"


def _noise(losses: Sequence[float]) -> float:
    """How much one step's loss differs from the next one's, as a share of it: medians, which no jump moves."""
    middle = median(losses)
    return median(abs(after - before) for before, after in pairwise(losses)) / middle if middle > 0 else 0.0
