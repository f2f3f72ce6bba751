"""SpecAugment: stretches of a recording's frames, and of its frequencies, that a step does not hear.

Comes in: settings and a row of a step.  Goes out: masks, a pure function of (seed, step, row); `HeardObjective`, whose
steps have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.contracts import Batch, Gather, Objective, Row, Rows, Window
from tunekit.data.batching.order import draw_raw, permutation
from tunekit.model.speech.features import FeatureExtractor
from tunekit.objectives.recordings import features_of
from tunekit.objectives.rows import RowObjective
from tunekit.recipe.bases.spec_augment_settings import SpecAugmentSettings

TIME, BANDS = 0, 1
MASKS = "masks"  # which a step's rows have beside their own parts


def drawn_masks(settings: SpecAugmentSettings, row: Row, bands: int, window: Window) -> NDArray[np.int32]:
    """(masks, 3): frames (0) or frequencies (1), the first and the one after the last.

    As many as transformers' Whisper draws: floor(prob * size / length + u), u from [0, 1), of the frames that are no
    filling.    Source: Park et al. 2019; the numbers of transformers' _compute_mask_indices.
    """
    kinds = [
        (TIME, row.sizes[0], settings.mask_time_prob, settings.mask_time_length, settings.mask_time_min_masks),
        (BANDS, bands, settings.mask_feature_prob, settings.mask_feature_length, settings.mask_feature_min_masks),
    ]
    found: list[list[int]] = []
    for kind, size, share, length, least in kinds:
        named = ("SpecAugment", window.seed, window.step, row.number, kind)
        starts = size - (length - 1)
        if share <= 0 or starts <= 0:
            continue
        draw = float(draw_raw(1, *named)[0]) / 2.0**64
        count = min(max(int(share * size / length + draw), least), size // length, starts)
        found += [[kind, start, start + length] for start in permutation(starts, *named, "starts")[:count].tolist()]
    return np.asarray(found, dtype=np.int32).reshape(-1, 3)


def masked(features: NDArray[np.float32], masks: NDArray[Any] | None) -> NDArray[np.float32]:
    """The features with 0 where they are masked, in place. Shapes: (bands, frames)."""
    for kind, start, stop in [] if masks is None else masks.tolist():
        if kind == TIME:
            features[:, start:stop] = 0.0
        else:
            features[start:stop] = 0.0
    return features


class HeardObjective(RowObjective):
    """Over recordings: each step masks others of their frames and frequencies; what is only measured is heard whole."""

    settings: Any  # SpecAugmentSettings of an objective
    processor: Any
    measures = False  # whether rows are only measured

    def heard(self, rows: Sequence[Row]) -> torch.Tensor:
        """(B, M, F) features, filled up as the model's extractor does, 0 where a step masks them; or (B, N) samples."""
        extractor: FeatureExtractor = self.processor
        return torch.from_numpy(np.stack([masked(features_of(row, extractor), row.parts.get(MASKS)) for row in rows]))

    def seconds(self, row: Row) -> float:
        """How long its recording is."""
        return float(row.sizes[0] * self.processor.seconds / self.processor.frames)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """With the features of each row."""
        raise NotImplementedError

    def prepare(self, model: object, window: Window, gather: Gather = list) -> Window:
        """Each row with the masks that SpecAugment draws for it in this step."""
        if self.measures or not self.settings.apply_spec_augment:
            return window
        return replace(window, batches=tuple(self._augmented(batch, window) for batch in window.batches))

    def _augmented(self, batch: Batch, window: Window) -> Batch:
        rows = [
            replace(row, parts={**row.parts, MASKS: drawn_masks(self.settings, row, self.processor.bands, window)})
            for row in batch.rows
        ]
        return self.collate([[row] for row in rows])

    def held_out(self) -> Objective:
        """Rows as they are."""
        found: Any = copy(self)
        found.measures = True
        return found  # type: ignore[no-any-return]

    def measuring(self, model: object, rows: Rows, batches: Iterable[Batch], gather: Gather) -> Objective:
        """Rows as they are."""
        return self.held_out()
