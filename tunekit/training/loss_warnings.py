"""Warns during training if the loss rises above earlier losses of the run, or if samples teach nothing. The report
shows these warnings."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median, median_low, pstdev

from tunekit.machine.devices import Devices
from tunekit.records import Reaction, Shows
from tunekit.training.state import LoopState
from tunekit.training.step_numbers import StepNumbers, rows_text

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
    "with evaluation.best: eval.loss, the best evaluated step is exported instead of the last step "
    "(training.eval_steps sets how often the run is evaluated)"
)


def watch_step(
    state: LoopState, numbers: StepNumbers, loss: float, shows: Shows, devices: Devices, *, exported: bool
) -> list[Reaction]:
    """Warnings if the loss diverges, and if samples of several steps teach nothing. The loss is not watched if another
    metric shows how good the run is. `exported`: the weights after this step are exported."""
    watched = watch_loss(state, numbers, loss, devices, exported=exported) if shows.headline.name == "loss" else []
    return [*watched, *watch_stalls(state, numbers, shows)]


def watch_loss(
    state: LoopState, numbers: StepNumbers, loss: float, devices: Devices, *, exported: bool
) -> list[Reaction]:
    """Compare a step's loss with the losses of earlier steps, and store it. Returns a warning if it diverges. The
    result is the same on every rank."""
    why, reactions = loss_warning(state.first_losses, state.past_losses, loss), []
    if why is not None:
        rows = rows_text(numbers.batches.batches, devices)
        outcome = "training continues"
        if exported:
            outcome = f"this was the last step, and its weights are exported; {KEEP_BEST}"
        action = f"{outcome}; lower training.learning_rate, or check the rows of this step: {rows}"
        reactions.append(Reaction(why, action, numbers.step))
    state.first_losses = state.first_losses or [loss]
    state.past_losses = [*state.past_losses, loss][-PAST:]
    return reactions


def watch_stalls(state: LoopState, numbers: StepNumbers, shows: Shows) -> list[Reaction]:
    """Warnings if a metric shows for several consecutive steps that the samples teach nothing. If a single step is
    enough for a warning, it is given only once in a run. The result is the same on every rank."""
    reactions, metrics = list[Reaction](), numbers.batches.preparation.metrics
    for stall in shows.stalled:
        count = state.useless_steps.get(stall.metric, 0) + 1 if metrics.get(stall.metric) == 1.0 else 0
        state.useless_steps[stall.metric] = count
        what = f"{stall.meaning} for {count} steps" if stall.steps > 1 else stall.meaning
        repeats = stall.steps == 1 and any(reaction["probe"] == what for reaction in state.reactions)
        if count == stall.steps and not repeats:
            reactions.append(Reaction(what, stall.action, numbers.step))
    return reactions


def loss_warning(first: Sequence[float], past: Sequence[float], loss: float) -> str | None:
    """Returns a warning if this loss is too high compared with earlier losses of the run; None otherwise.

    `first`: the loss of the first step; `past`: the losses of up to PAST previous steps. There are three kinds of
    warnings.
    Spike: the loss is more than SHARE times the mean of `past`, and more than DEVIATIONS standard deviations above this
    mean.
    Jump: see `jump`. It is not reported if `past` contains a jump too, because then jumps are noise.
    Rise: the last LAST losses are all above SHARE times the first loss (in a noisy run, more). It is reported when it
    starts.
    """
    if len(past) >= LEAST:
        mean, deviation = fmean(past), pstdev(past)
        if loss > SHARE * mean and loss > mean + DEVIATIONS * deviation:
            return f"the loss {loss:.4g} is far above the mean loss {mean:.4g} of the previous {len(past)} steps"
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
    """Returns a text if this loss is many times the median of the last few losses; None otherwise. Older losses do not
    matter."""
    before = median_low(past[-RECENT:]) if past else 0.0
    if before <= 0 or loss < max(JUMP * before, min(JUMP_FLOOR, JUMP_SHARE * first[0])):
        return None
    return f"{loss / before:,.0f} times the loss of the steps just before ({before:.4g})"


def last_jump(losses: Sequence[float]) -> str | None:
    """Returns a warning if the loss jumps at the last step of a run; None otherwise. This matters because the weights
    after this step are exported."""
    why = jump(losses[:1], losses[:-1], losses[-1]) if losses else None
    return None if why is None else f"the run ended on a spike: the loss {losses[-1]:.4g} of the last step is {why}"


def rise(losses: Sequence[float]) -> str | None:
    """Returns a verdict if a run ended with a higher loss than it began with; None otherwise. Used for runs without an
    evaluation before training.

    The mean loss over the last tenth of the steps is compared with the loss of the first step, before any update. The
    increase counts if it is larger than two limits: the share LEAST_RISE of the first loss, and NOISES times the noise.
    A short run hides its noise, so the noise is assumed to be at least UNKNOWN_NOISE / sqrt(steps). The jumps of a
    diverged run look like noise. Therefore an increase by the share MOST_RISE always counts.
    """
    if len(losses) < 2 or losses[0] <= 0:
        return None
    tenth = -(-len(losses) // 10)
    final, noise = fmean(losses[-tenth:]), max(_noise(losses), UNKNOWN_NOISE / math.sqrt(len(losses)))
    if final <= losses[0] * (1.0 + min(max(LEAST_RISE, NOISES * noise), MOST_RISE)):
        return None
    return (
        f"the run ended worse than it began: training loss {final:.4g} over the last tenth of the steps, "
        f"{losses[0]:.4g} at step 1"
    )


def _noise(losses: Sequence[float]) -> float:
    """The median difference between the losses of consecutive steps, divided by the median loss. Medians ignore single
    jumps."""
    middle = median(losses)
    return median(abs(after - before) for before, after in pairwise(losses)) / middle if middle > 0 else 0.0
