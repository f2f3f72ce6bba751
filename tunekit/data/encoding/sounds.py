"""Samples as a model hears them: one channel, another rate, pieces that end where it is quiet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.data.reading.sound import Sound

ZEROS, ROLLOFF = 6, 0.99  # of the low-pass filter: zero crossings to each side, and its edge as a share of Nyquist's
QUIET_SECONDS = 0.1  # over which loudness is measured
SEARCHED = 1 / 3  # of a piece, at its end: where the quietest moment is looked for


def mixed(samples: NDArray[np.float32]) -> torch.Tensor:
    """(samples,) the mean of the channels. Shapes: (samples, channels)."""
    found = torch.from_numpy(np.ascontiguousarray(samples))
    return found[:, 0].clone() if found.shape[1] == 1 else found.mean(dim=1)


def resampled(samples: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    """(wanted samples,) y[n] = sum_k x[k] h(n / wanted - k / rate), h a sinc that a Hann window cuts off.

    Shapes: (samples,).    Source: Smith 2002, digital audio resampling; the filter of torchaudio's `resample`.
    """
    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    old, new = rate // divisor, wanted // divisor
    kernel, width = _kernel(old, new)  # (new, 1, 2 width + old)
    padded = torch.nn.functional.pad(samples[None, None], (width, width + old))
    found = torch.nn.functional.conv1d(padded, kernel, stride=old)  # (1, new, steps)
    return found[0].T.reshape(-1)[: math.ceil(new * len(samples) / old)].contiguous()


@cache
def _kernel(old: int, new: int) -> tuple[torch.Tensor, int]:
    edge = min(old, new) * ROLLOFF
    width = math.ceil(ZEROS * old / edge)
    index = torch.arange(-width, width + old, dtype=torch.float64)[None] / old  # (1, 2 width + old)
    times = (torch.arange(0, -new, -1, dtype=torch.float64)[:, None] / new + index) * edge  # (new, 2 width + old)
    times = times.clamp(-ZEROS, ZEROS)
    window = torch.cos(times * math.pi / ZEROS / 2) ** 2
    return (torch.sinc(times) * window * edge / old).float()[:, None], width


def heard(sound: Sound, start: int, stop: int, wanted: int) -> torch.Tensor:
    """(samples,) of samples start .. stop-1 of a recording, in one channel and at the rate that is wanted."""
    return resampled(mixed(sound.read(start, stop)), sound.rate, wanted)


def quietest(samples: torch.Tensor, rate: int, first: int, last: int) -> int:
    """The sample between two of them around which it is quietest, the later one of equals. Shapes: (samples,)."""
    width = max(round(QUIET_SECONDS * rate), 1)
    around = samples[max(first - width // 2, 0) : last + width // 2].double()
    if len(around) <= width:
        return (first + last) // 2
    power = around.square().unfold(0, width, max(width // 10, 1)).mean(dim=1)  # (places,)
    place = len(power) - 1 - int(power.flip(0).argmin())
    return min(max(max(first - width // 2, 0) + place * max(width // 10, 1) + width // 2, first), last)


def pieces(sound: Sound, seconds: float) -> Iterator[tuple[int, int]]:
    """Samples of a recording's pieces, none longer than `seconds`, cut where the end of the longest is quietest."""
    start, most = 0, int(seconds * sound.rate)
    while sound.samples - start > most:
        window = mixed(sound.read(start, start + most))
        stop = start + quietest(window, sound.rate, round(most * (1 - SEARCHED)), most)
        yield start, stop
        start = stop
    yield start, sound.samples
