"""The loss of one more step goes in; where it is above the run's own past, a warning that names the step's rows comes
out, and is kept for the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, pstdev

from tunekit.records import Reaction
from tunekit.training.readings import Reading, rows_text
from tunekit.training.state import Run

PAST = 50  # steps before this one that are looked at
LEAST = 8  # of them, for a spike to be told from noise
DEVIATIONS, SHARE = 6.0, 1.5  # a spike is this far above their mean
FIRST, LAST = 2, 5  # steps that hardly learned yet, and steps that should be no worse


def watch_loss(run: Run, reading: Reading, loss: float) -> None:
    """Compare a step's loss with those before it, and add it to them; the same on every rank."""
    state = run.state
    why = divergence(state.first_losses, state.past_losses, loss)
    if why is not None:
        rows = rows_text(reading.window.batches, run.devices)
        action = f"training goes on; lower training.learning_rate, or look at the rows of this step: {rows}"
        state.reactions.append(asdict(Reaction(why, action, reading.step)))
        run.warn(f"step {reading.step}: {why}; {action}")
    state.first_losses += [loss] if len(state.first_losses) < FIRST else []
    state.past_losses = [*state.past_losses, loss][-PAST:]


def divergence(first: Sequence[float], past: Sequence[float], loss: float) -> str | None:
    """Why this loss is above the run's own past, or None.

    `first`: the losses of the first FIRST steps; `past`: those of the up to PAST steps before this one. A spike is more
    than SHARE times the mean of the past and more than DEVIATIONS of its standard deviations above it. A rise is LAST
    steps in a row of more than SHARE times the largest loss of the first; it is told when it begins.
    """
    if len(past) >= LEAST:
        mean, deviation = fmean(past), pstdev(past)
        if loss > SHARE * mean and loss > mean + DEVIATIONS * deviation:
            return f"the loss {loss:.4g} is far above that of the {len(past)} steps before ({mean:.4g} on average)"
    limit = SHARE * max(first, default=loss)
    if len(past) >= LAST and past[-LAST] <= limit < min([*past[1 - LAST :], loss]):
        return f"the loss has been above {limit:.4g} for {LAST} steps, and training began at {max(first):.4g}"
    return None
