"""Warnings about a loss that rises above the earlier losses of the run, and about samples that teach nothing. The
report shows them."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import fmean, median, median_low, pstdev

from tunekit.records import Reaction
from tunekit.training.readings import Reading, rows_text
from tunekit.training.state import Run

PAST = 50  # number of previous steps that are compared
LEAST = 8  # minimum number of previous steps, to distinguish a spike from noise
DEVIATIONS, SHARE = 6.0, 1.5  # a spike is this far above the mean of previous steps
LAST = 5  # consecutive steps that are compared with the first step, whose loss is the loss before any update
# A jump is a loss of JUMP times the median of the RECENT previous steps. Losses near zero vary a lot, so it must also
# reach JUMP_FLOOR, or JUMP_SHARE of a small first loss.
JUMP, RECENT, JUMP_FLOOR, JUMP_SHARE = 50.0, 3, 0.1, 0.05
# A run ends worse if its loss rose by NOISES times its noise, and by the share LEAST_RISE. Twice the first loss is
# never noise.
NOISES, LEAST_RISE, MOST_RISE, UNKNOWN_NOISE = 4.0, 0.1, 1.0, 0.6
KEEP_BEST = (
    "with evaluation.best: eval.loss, the best evaluated step (training.eval_steps) is exported instead of the last"
)


def watch_step(run: Run, reading: Reading, loss: float) -> None:
    """Warn if the loss diverges, unless the objective is judged by a different metric. Also warn if a metric stays at 1
    that should not."""
    if run.shows.headline.name == "loss":
        watch_loss(run, reading, loss)
    watch_stalls(run, reading)


def watch_loss(run: Run, reading: Reading, loss: float) -> None:
    """Compare a step's loss with the losses of earlier steps, and store it. The result is the same on every rank."""
    state = run.state
    why = divergence(state.first_losses, state.past_losses, loss)
    if why is not None:
        rows = rows_text(reading.window.batches, run.devices)
        last = reading.step == run.windows.steps and run.evaluation.best is None
        outcome = f"this was the last step, and its weights are exported; {KEEP_BEST}" if last else "training continues"
        action = f"{outcome}; lower training.learning_rate, or check the rows of this step: {rows}"
        state.reactions.append(asdict(Reaction(why, action, reading.step)))
        run.warn(f"step {reading.step}: {why}; {action}")
    state.first_losses = state.first_losses or [loss]
    state.past_losses = [*state.past_losses, loss][-PAST:]


def watch_stalls(run: Run, reading: Reading) -> None:
    """Warn if nothing could be learned in several consecutive steps. A warning that one step justifies is printed once
    in a run. The result is the same on every rank."""
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
    """The message if this loss is too far above earlier losses of the run, or None.

    `first`: the loss of the first step; `past`: the losses of up to PAST previous steps. A spike is more than SHARE
    times the mean of `past`, and more than DEVIATIONS standard deviations above the mean. A rise is LAST consecutive
    steps above SHARE times the first loss, or, in a noisy run, above it by NOISES times the noise; it is reported when
    it starts. A jump is not reported if an earlier step of `past` rose as much, because then it is noise.
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
            return f"the loss has been above {limit:.4g} for {LAST} steps, but was {first[0]:.4g} at step 1"
    return None


def jump(first: Sequence[float], past: Sequence[float], loss: float) -> str | None:
    """The message if this loss is many times the loss of the previous few steps, or None. Earlier losses are
    ignored."""
    before = median_low(past[-RECENT:]) if past else 0.0
    if before <= 0 or loss < max(JUMP * before, min(JUMP_FLOOR, JUMP_SHARE * first[0])):
        return None
    return f"{loss / before:,.0f} times that of the steps just before ({before:.4g})"


def last_jump(losses: Sequence[float]) -> str | None:
    """The message if the loss jumps at the last step of a run, or None. This matters because the exported weights are
    the weights after this step."""
    why = jump(losses[:1], losses[:-1], losses[-1]) if losses else None
    return None if why is None else f"it ended on a spike: the loss {losses[-1]:.4g} of the last step is {why}"


def rise(losses: Sequence[float]) -> str | None:
    """The message if a run ended worse than it began, or None. It is used for runs without an evaluation before
    training.

    The mean loss of the last tenth of the steps is compared with the loss of the first step, before any update. It is
    worse if it is higher by more than the share LEAST_RISE, and by more than NOISES times the noise. Few steps do not
    show the noise, so it is at least UNKNOWN_NOISE / sqrt(steps). The jumps of a diverged run look like noise, so a
    rise by MOST_RISE always counts.
    """
    if len(losses) < 2 or losses[0] <= 0:
        return None
    tenth = -(-len(losses) // 10)
    final, noise = fmean(losses[-tenth:]), max(_noise(losses), UNKNOWN_NOISE / math.sqrt(len(losses)))
    if final <= losses[0] * (1.0 + min(max(LEAST_RISE, NOISES * noise), MOST_RISE)):
        return None
    return f"worse than it began: training loss {final:.4g} over the last tenth of the steps, {losses[0]:.4g} at step 1"


def _noise(losses: Sequence[float]) -> float:
    """The median difference between the losses of consecutive steps, over the median loss. Single jumps do not change
    medians."""
    middle = median(losses)
    return median(abs(after - before) for before, after in pairwise(losses)) / middle if middle > 0 else 0.0
