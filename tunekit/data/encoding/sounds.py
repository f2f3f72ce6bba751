"""Converts recordings for a model: mixes to one channel, resamples, and cuts at quiet moments."""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from tunekit.data.reading.sound import Sound

ZEROS, ROLLOFF = 6, 0.99  # low-pass filter: zero crossings on each side; cutoff as a share of the Nyquist frequency
KERNEL_TAPS = 2**22  # maximum size of a filter that is stored for all phases; some pairs of rates would need gigabytes
BLOCK_TAPS = 2**18  # size of the parts that are computed one by one, if a filter is too large to be stored
QUIET_SECONDS = 0.1  # loudness is measured over windows of this length
SEARCHED = 1 / 3  # share of a piece, at its end, that is searched for the quietest moment


def mixed(sound: Sound, start: int, stop: int) -> torch.Tensor:
    """(samples,) the mean of the channels, for samples start .. stop-1."""
    return torch.cat([_mean(torch.from_numpy(np.ascontiguousarray(block))) for block in sound.blocks(start, stop)])


def _mean(samples: torch.Tensor) -> torch.Tensor:
    """(samples,) the mean of the channels. Shapes: (samples, channels)."""
    return samples[:, 0].clone() if samples.shape[1] == 1 else samples.mean(dim=1)


def resampled(samples: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    """(wanted samples,) y[n] = sum_k x[k] h(n / wanted - k / rate), where h is a sinc with a Hann window.

    Shapes: (samples,).    Source: Smith 2002, digital audio resampling; the filter of torchaudio's `resample`.
    """
    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    old, new = rate // divisor, wanted // divisor
    width = math.ceil(ZEROS * old / (min(old, new) * ROLLOFF))
    if new * (2 * width + old) > KERNEL_TAPS:
        return _resampled_in_blocks(samples, old, new, width)
    kernel = _kernel(old, new, width)  # (new, 1, 2 width + old)
    padded = torch.nn.functional.pad(samples[None, None], (width, width + old))
    found = torch.nn.functional.conv1d(padded, kernel, stride=old)  # (1, new, steps)
    return found[0].T.reshape(-1)[: math.ceil(new * len(samples) / old)].contiguous()


def _resampled_in_blocks(samples: torch.Tensor, old: int, new: int, width: int) -> torch.Tensor:
    """Computes `resampled` in blocks of samples, with the filter computed again for each block. Shapes: (samples,)."""
    windows = torch.nn.functional.pad(samples, (width, width + 1)).unfold(0, 2 * width + 1, 1)
    edge = min(old, new) * ROLLOFF / old
    taps = (torch.arange(-width, width + 1, dtype=torch.float64) * edge).float()  # (2 width + 1,)
    resampled, size = torch.empty(-(-new * len(samples) // old)), max(BLOCK_TAPS // len(taps), 1)
    for start in range(0, len(resampled), size):
        places = torch.arange(start, min(start + size, len(resampled)))
        nearest = places * old // new
        beyond = ((places * old - nearest * new).double() * (edge / new)).float()
        times = (taps - beyond[:, None]).clamp_(-ZEROS, ZEROS)  # (places, 2 width + 1)
        weights = torch.sinc(times).mul_(torch.cos(times.mul_(math.pi / ZEROS / 2)).square_())
        resampled[places] = weights.mul_(windows[nearest]).sum(dim=1) * edge
    return resampled


@lru_cache(maxsize=4)
def _kernel(old: int, new: int, width: int) -> torch.Tensor:
    edge = min(old, new) * ROLLOFF
    index = torch.arange(-width, width + old, dtype=torch.float64)[None] / old  # (1, 2 width + old)
    times = (torch.arange(0, -new, -1, dtype=torch.float64)[:, None] / new + index) * edge  # (new, 2 width + old)
    times = times.clamp(-ZEROS, ZEROS)
    window = torch.cos(times * math.pi / ZEROS / 2) ** 2
    return (torch.sinc(times) * window * edge / old).float()[:, None]


def heard(sound: Sound, start: int, stop: int, wanted: int) -> torch.Tensor:
    """(samples,) samples start .. stop-1 of a recording, mixed to one channel and resampled to the rate `wanted`."""
    return resampled(mixed(sound, start, stop), sound.rate, wanted)


def quietest(samples: torch.Tensor, rate: int, first: int, last: int) -> int:
    """The index of the quietest place between samples `first` and `last`; if several places are equal,
    the last of them.

    Shapes: (samples,).
    """
    width = max(round(QUIET_SECONDS * rate), 1)
    around = samples[max(first - width // 2, 0) : last + width // 2].double()
    if len(around) <= width:
        return (first + last) // 2
    power = around.square().unfold(0, width, max(width // 10, 1)).mean(dim=1)  # (places,)
    place = len(power) - 1 - int(power.flip(0).argmin())
    return min(max(max(first - width // 2, 0) + place * max(width // 10, 1) + width // 2, first), last)


def pieces(sound: Sound, seconds: float) -> Iterator[tuple[int, int]]:
    """(start, stop) of a recording's pieces. No piece is longer than `seconds`.

    Each cut is at the quietest moment in the last third of the longest possible piece.
    """
    start, most = 0, int(seconds * sound.rate)
    while sound.samples - start > most:
        window = mixed(sound, start, start + most)
        stop = start + quietest(window, sound.rate, round(most * (1 - SEARCHED)), most)
        yield start, stop
        start = stop
    yield start, sound.samples
