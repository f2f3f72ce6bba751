"""Rows of recordings. A row stores the recording's features, or the file and range from which they are computed.
SpecAugment masks are drawn for each step."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Array, EncodeOptions, Row, RowKind
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.encoding.sounds import heard
from tunekit.data.reading.sound import SILENCE, Sound, opened
from tunekit.files.cache_folder import default_cache_folder
from tunekit.files.durable import free_bytes
from tunekit.formats.media import Media
from tunekit.model.speech.features import FeatureExtractor
from tunekit.objectives.rows.labels import utf8
from tunekit.objectives.rows.spec_augment import drawn_masks, masked
from tunekit.recipe.bases.spec_augment_settings import SpecAugmentSettings

SILENT = "silent recording"
COMPUTED = "recordings read again in each step, because the cache's disk has less than 5 GiB of free space"
MIN_FREE_BYTES = 5 * 2**30  # free space of the cache's disk: features of 30 s take about 1 MB
SOUND_PARTS = {"features": "<f4", "place": "u1", "samples": "<i4"}
MASKS = "masks"  # a part that `draw` adds


@dataclass(frozen=True)
class Clip:
    """The samples from start to stop-1 of a recording."""

    media: Media
    start: int
    stop: int

    def features(self, processor: FeatureExtractor) -> Array:
        """Log-mel features (frames, bands), as FeatureExtractor.features returns them. Raises: DataError if the file
        no longer exists."""
        with opened(self.media) as sound:
            return processor.features(heard(sound, self.start, self.stop, processor.rate))

    @property
    def place(self) -> Array:
        """The clip's file and range of samples, as UTF-8 JSON."""
        return utf8(json.dumps([os.path.abspath(self.media.path), self.start, self.stop]))


@dataclass(frozen=True, eq=False)
class RecordingRows(RowKind):
    """The base class of rows of recordings. Parts SOUND_PARTS: `features`; or `place`, the file and range from which
    features are computed; and `samples`, the number of samples at the model's rate. `draws`: whether SpecAugment masks
    frames and frequencies."""

    settings: SpecAugmentSettings
    processor: FeatureExtractor
    fingerprint: str
    options: EncodeOptions
    notices: Counter[str] = field(default_factory=Counter)
    draws: bool = False

    def sound_parts(self, clip: Clip) -> dict[str, Array]:
        """The parts SOUND_PARTS of a clip's row. `notices` counts clips whose features are not stored. Raises: Dropped
        for a silent clip."""
        with opened(clip.media) as sound:
            samples = heard(sound, clip.start, clip.stop, self.processor.rate)
        if float(samples.abs().max()) < SILENCE:
            raise Dropped(SILENT)
        count = np.asarray([len(samples)], np.int32)
        if clip.media.data is None and free_bytes(default_cache_folder()) < MIN_FREE_BYTES:
            self.notices[COMPUTED] += 1
            return {"features": np.zeros(0, np.float32), "place": clip.place, "samples": count}
        return {"features": self.processor.features(samples).reshape(-1), "place": utf8(""), "samples": count}

    def features_of(self, rows: Sequence[Row]) -> Tensor:
        """Features (B, M, F), padded as the model's feature extractor pads them, and 0 where masked; or samples (B,
        N)."""
        return torch.from_numpy(np.stack([masked(self._features(row), row.parts.get(MASKS)) for row in rows]))

    def _features(self, row: Row) -> Array:
        """Features (bands, frames), computed from the file if they are not stored. Raises: DataError if the file no
        longer exists."""
        place = row.parts["place"].tobytes().decode()
        if not place:
            return self.processor.padded_features(row.parts["features"])
        path, start, stop = json.loads(place)
        return self.processor.padded_features(Clip(Media(path), start, stop).features(self.processor).reshape(-1))

    def seconds(self, row: Row) -> float:
        """The length of the row's recording in seconds."""
        return float(row.sizes[0] * self.processor.seconds / self.processor.frames)

    def draw(self, row: Row, key: tuple[int, ...]) -> Row:
        """The row with the SpecAugment masks of this step."""
        return row.with_parts({MASKS: drawn_masks(self.settings, row, self.processor.bands, key[:3])})

    def evaluation_copy(self) -> Self:
        """A copy of the rows for evaluation, without masks."""
        return replace(self, draws=False)


def lasts(sound: Sound, maximum: float) -> str:
    """The error message for a recording that is too long."""
    return f"{sound.name} lasts {sound.seconds:,.1f} s, but the model's input is at most {maximum:g} s"


def longer_than(maximum: float) -> str:
    """The reason for dropping a recording that is too long."""
    return f"recording longer than {maximum:g} s, the model's maximum"
