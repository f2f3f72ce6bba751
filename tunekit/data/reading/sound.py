"""Reads recordings in blocks, from files or from bytes in rows.

Only this module imports soundfile.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunekit.errors import DataError, InputError
from tunekit.formats.media import Media
from tunekit.machine.versions import needed

SILENCE = 1e-4  # the largest sample of a silent recording: -80 dB
RATES = (100, 768_000)  # possible samples per second: a header with another rate is damaged
BLOCK_VALUES = 2**22  # read at a time
STREAMED = 0x7F000000  # a larger size in a RIFF header means that the size was unknown when the header was written
HOW_TO_INSTALL = "run: pip install 'tunekit[speech]'"


@dataclass(frozen=True)
class Sound:
    """An open recording. `rate`: the number of samples per second."""

    stream: Any
    name: str
    rate: int
    samples: int
    channels: int

    @property
    def seconds(self) -> float:
        """Length of the recording in seconds."""
        return self.samples / self.rate

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """(samples, channels) samples start .. stop-1. Raises: DataError if the file is cut short or damaged."""
        return np.concatenate(list(self.blocks(start, stop)))

    def blocks(self, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        """Samples start .. stop-1 in blocks of BLOCK_VALUES, because even a small file can decode to gigabytes."""
        stop, size = max(min(stop, self.samples), start), max(BLOCK_VALUES // self.channels, 1)
        for first in range(start, stop, size) or [start]:
            yield self._block(first, min(size, stop - first), seek=first == start)

    def _block(self, start: int, count: int, *, seek: bool) -> NDArray[np.float32]:
        """`count` samples from `start` on. `seek`: move to `start` first. Consecutive blocks are read without seeking,
        because seeking can change the decoded samples."""
        import soundfile

        try:
            if seek:
                self.stream.seek(start)
            samples: NDArray[np.float32] = self.stream.read(count, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
            raise DataError(
                f"the rest of {self.name} cannot be read: {_said(error)}", "the file may be damaged"
            ) from None
        if len(samples) < count:
            what = (
                f"{self.name} ends after {(start + len(samples)) / self.rate:.1f} s, but should last "
                f"{self.seconds:.1f} s"
            )
            raise DataError(what, "download the file again, or remove the row")
        if not np.isfinite(samples).all():
            raise DataError(f"{self.name} contains samples that are NaN or infinite", "write the file anew")
        return samples


@contextmanager
def opened(media: Media) -> Iterator[Sound]:
    """The open recording; a context manager that closes it.

    Raises: DataError if the file is not a recording, or is empty; InputError if soundfile is not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # the second: no libsndfile
        raise InputError(*needed("reading recordings", HOW_TO_INSTALL, error)) from error
    name, place = media.name, Path(media.path)
    if media.data is None and not place.is_file():
        what = "is no file" if place.exists() else "does not exist"
        raise DataError(f"{media.path} {what}", "check the path; a relative path starts at the folder of the table")
    source = str(place) if media.data is None else io.BytesIO(media.data)
    try:
        stream = soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError) as error:
        empty = not (media.data if media.data is not None else place.stat().st_size)
        what = "is empty" if empty else f"cannot be read as a recording: {_said(error)}"
        known = "supported formats are WAV, FLAC, Ogg, Opus, MP3 and AIFF, with any file name"
        raise DataError(f"{name} {what}", "" if empty else known) from None
    with stream:
        _require_whole(media, name)
        sound = Sound(stream, name, stream.samplerate, stream.frames, stream.channels)
        if sound.samples <= 0:
            raise DataError(f"{name} has no samples", "leave the row out")
        if not RATES[0] <= sound.rate <= RATES[1]:
            what = (
                f"{name} has {sound.rate:,} samples per second according to its header, but {RATES[0]} to {RATES[1]:,} "
                "are possible"
            )
            raise DataError(what, "repair the header, or remove the row")
        yield sound


def _require_whole(media: Media, name: str) -> None:
    """Raises: DataError if a RIFF file is shorter than its header states. soundfile does not check this."""
    if media.data is None:
        size = Path(media.path).stat().st_size
        with open(media.path, "rb") as file:
            start = file.read(8)
    else:
        size, start = len(media.data), media.data[:8]
    said = int.from_bytes(start[4:8], "little") + 8
    if start[:4] == b"RIFF" and size < said < STREAMED:
        what = f"{name} is cut short: it has {size:,} bytes, but {said:,} according to its header"
        raise DataError(what, "download the file again, or remove the row")


def _said(error: BaseException) -> str:
    """The message of soundfile's error, without the path."""
    return str(error).strip().partition("\n")[0].rpartition(": ")[2] or type(error).__name__
