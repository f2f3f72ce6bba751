"""Copies a step's loss and gradient norm from the device to the host, and checks them. If the host would have to wait
for the device, the numbers are read one step later."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.contracts import Batch, StepBatches, Sums, Tensors
from tunekit.errors import NumericsError, listed
from tunekit.machine.devices import Devices, kind_of, summing_dtype
from tunekit.machine.placing import to_device
from tunekit.records import StepRecord

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
