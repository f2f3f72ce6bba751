"""Recordings of any rate, any number of channels and any header take bounded memory, and keep their numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tunekit.data.encoding import sounds
from tunekit.data.encoding.sounds import mixed, resampled
from tunekit.data.reading import sound as reading
from tunekit.data.reading.sound import opened
from tunekit.errors import DataError
from tunekit.formats.media import Media

MEBIBYTE = 2**20


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that is made inside."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("rate", [4001, 11127, 191_999])
def test_odd_rates_take_little_memory_and_keep_a_tone(rate: int) -> None:
    pitch, seconds = 500.0, 0.25
    samples = torch.sin(2 * math.pi * pitch * torch.arange(round(seconds * rate)) / rate)
    with LargestTensor() as largest:
        heard = resampled(samples, rate, 16000)
    assert largest.bytes <= 4 * MEBIBYTE
    assert len(heard) == math.ceil(16000 * len(samples) / rate)
    expected = torch.sin(2 * math.pi * pitch * torch.arange(len(heard)) / 16000)
    middle = slice(len(heard) // 10, -len(heard) // 10)
    assert float((heard - expected)[middle].abs().max()) < 2e-3


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 47952, 96000])
def test_both_ways_of_resampling_give_the_same_numbers(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randn(rate // 4, generator=torch.Generator().manual_seed(0))
    kept = resampled(samples, rate, 16000)
    monkeypatch.setattr(sounds, "KERNEL_TAPS", 0)
    assert torch.allclose(resampled(samples, rate, 16000), kept, rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_blocks_are_the_whole_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    values = np.random.default_rng(0).uniform(-0.5, 0.5, (4000, channels))
    soundfile.write(tmp_path / "a.flac", values, 8000)
    with opened(Media(str(tmp_path / "a.flac"))) as sound:
        whole, between = mixed(sound, 0, 4000), mixed(sound, 1234, 3999)
    monkeypatch.setattr(reading, "BLOCK_VALUES", 1000)
    with opened(Media(str(tmp_path / "a.flac"))) as sound:
        assert max(map(len, sound.blocks(0, 4000))) == 1000 // channels
        assert torch.equal(mixed(sound, 0, 4000), whole)
        assert torch.equal(mixed(sound, 1234, 3999), between)
        assert torch.equal(whole[1234:3999], between)
        assert len(mixed(sound, 4000, 4000)) == 0


def with_rate(file: bytes, rate: int) -> bytes:
    return file[:24] + rate.to_bytes(4, "little") + file[28:]


@pytest.mark.parametrize("rate", [1, 99, 768_001, 2**31 - 1])
def test_a_header_with_an_impossible_rate_is_refused_by_name(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000, subtype="PCM_16")
    file = with_rate((tmp_path / "a.wav").read_bytes(), rate)
    (tmp_path / "a.wav").write_bytes(file)
    match = rf"a\.wav has {rate:,} samples per second according to its header, but 100 to 768,000"
    with pytest.raises(DataError, match=match), opened(Media(str(tmp_path / "a.wav"))):
        pass
