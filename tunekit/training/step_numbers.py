"""Copies a step's loss and gradient norm from the device to the host, and checks them: whether they are finite, whether
the loss rises above earlier losses of the run, and whether samples teach nothing. If the host would have to wait for
the device, the numbers are read one step later."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, median_low, pstdev

import torch
from torch import Tensor

from tunekit.contracts import Batch, StepBatches, Sums, Tensors
from tunekit.errors import NumericsError, listed
from tunekit.machine.devices import Devices, kind_of, summing_dtype
from tunekit.machine.placing import to_device
from tunekit.records import Reaction, Shows, StepRecord
from tunekit.training.state import LoopState

CLOCK_SECONDS = 1e-6  # a step is not shorter; the clock of some systems is coarse and may show 0


@dataclass
class StepNumbers:
    """The numbers of a step while they are copied to the host. `counts`: tokens, supervised tokens, micro-batches."""

    step: int
    batches: StepBatches
    losses: Sequence[Tensor]  # the loss of each micro-batch
    counts: Sequence[float]
    numbers: Tensor  # (2 + M,) float64 (summing_dtype) on the host: loss, norm before clipping, logged values
    names: Sequence[str]  # names of the logged values
    copied: torch.Event | None  # the device's event after which `numbers` is valid, None on a CPU
    started: float
    sent: float = 0.0  # when the host had queued the whole step
    rate: float = 0.0

    def read(self) -> tuple[float, float]:
        """Wait for the copy, and return loss and gradient norm."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm, *_ = self.numbers.tolist()
        return loss, norm

    def arrival(self, earliest: float) -> float:
        """Wait for the copy, and return when it ended. If it had ended before the host asks, the host is slower than
        the device, and the step ends when it was queued. `earliest`: when the step can have started."""
        arrived = self.copied is None or bool(self.copied.query())
        if self.copied is not None:
            self.copied.synchronize()
        return self.sent if arrived and self.sent > earliest else time.monotonic()

    def logged_values(self) -> dict[str, float]:
        """The logged values by name; call `read` before. NaN values are left out: they are means over no rows."""
        named = zip(self.names, self.numbers[2:].tolist(), strict=True)
        finite = {name: number for name, number in named if math.isfinite(number)}
        return {**self.batches.preparation.metrics, **finite}

    def record(self, loss: float, norm: float, seconds: float, peak_bytes: int, *, shown: bool) -> StepRecord:
        """The step's record for metrics.jsonl, with its samples if `shown`."""
        return StepRecord(
            step=self.step,
            epoch=self.batches.epoch,
            loss=loss,
            learning_rate=self.rate,
            grad_norm=norm,
            tokens=int(self.counts[0]),
            supervised_tokens=int(self.counts[1]),
            seconds=seconds,
            tokens_per_second=self.counts[0] / max(seconds, CLOCK_SECONDS),
            peak_bytes=peak_bytes,
            metrics=self.logged_values(),
            samples=list(self.batches.preparation.samples) or None if shown else None,
        )

    def spent(self, seconds: float) -> dict[str, float]:
        """The seconds of the step, divided into the time categories of the report."""
        parts = self.batches.preparation.seconds
        return {"train": seconds - sum(parts.values()), **parts}


def means(names: Sequence[str], sums: Sums, units: Tensor, devices: Devices) -> Tensors:
    """The logged values of a step by name, each of shape (): means over the loss units of all ranks. `sums`: this
    rank's sums."""
    if not names:
        return {}
    absent = torch.zeros((), dtype=summing_dtype(devices.device), device=devices.device)
    shares = torch.stack([sums.get(name, absent) for name in names]) / to_device(units.sum(), devices.device)
    return dict(zip(names, devices.sum(shares), strict=True))


def start_numbers(
    step: int,
    batches: StepBatches,
    losses: Sequence[Tensor],
    counts: Sequence[float],
    named: Mapping[str, Tensor],
    started: float,
) -> StepNumbers:
    """Start to copy a step's numbers (loss, norm, logged values) to the host, without waiting for the copy."""
    device = next(iter(named.values())).device
    numbers = torch.stack([value.detach().to(summing_dtype(device)) for value in named.values()])  # (2 + M,)
    copied = None
    if kind_of(device).own_memory:
        pinned = torch.empty(len(numbers), dtype=numbers.dtype, pin_memory=True)
        numbers = pinned.copy_(numbers, non_blocking=True)
        copied = torch.accelerator.current_stream(device).record_event()
    return StepNumbers(step, batches, losses, counts, numbers, list(named)[2:], copied, started)


def check_finite(numbers: StepNumbers, loss: float, norm: float, devices: Devices, *, may_overflow: bool) -> None:
    """Check that loss and gradient norm are finite. `may_overflow` (float16): a non-finite norm is allowed, because the
    loss scale handles it.

    Raises: NumericsError, naming the step and its rows.
    """
    if math.isfinite(loss) and (math.isfinite(norm) or may_overflow):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    finite = [bool(torch.isfinite(value).all()) for value in numbers.losses]
    batches = numbers.batches.batches
    bad = [batch for batch, is_finite in zip(batches, finite, strict=True) if not is_finite]
    rows = rows_text(bad, devices) or rows_text(batches, devices)
    what = f"step {numbers.step}: the {what} is not finite; rows {rows}. This step changed no weight"
    raise NumericsError(what, "lower training.learning_rate, or check these rows")


def rows_text(batches: Sequence[Batch], devices: Devices) -> str:
    """The files and line numbers of these batches' rows on all ranks; at most eight rows."""
    return listed(devices.gather([row.origin for batch in batches for row in batch.rows]), 8)


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
