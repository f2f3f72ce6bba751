"""SpecAugment: a step masks stretches of a recording's frames, and of its frequencies. Masks are a pure function of
(seed, step, row)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunekit.contracts import Row
from tunekit.data.batching.order import draw_raw, permutation
from tunekit.recipe.bases.spec_augment_settings import SpecAugmentSettings

TIME, BANDS = 0, 1


def drawn_masks(settings: SpecAugmentSettings, row: Row, bands: int, key: tuple[int, ...]) -> NDArray[np.int32]:
    """(masks, 3): frames (0) or frequencies (1), the first and the one after the last. `key`: seed, step, row.

    As many as transformers' Whisper draws: floor(prob * size / length + u), u from [0, 1), of the frames that are no
    filling.    Source: Park et al. 2019; the numbers of transformers' _compute_mask_indices.
    """
    kinds = [
        (TIME, row.sizes[0], settings.mask_time_prob, settings.mask_time_length, settings.mask_time_min_masks),
        (BANDS, bands, settings.mask_feature_prob, settings.mask_feature_length, settings.mask_feature_min_masks),
    ]
    masks: list[list[int]] = []
    for kind, size, share, length, least in kinds:
        named: tuple[int | str, ...] = ("SpecAugment", *key, kind)
        starts = size - (length - 1)
        if share <= 0 or starts <= 0:
            continue
        draw = float(draw_raw(1, *named)[0]) / 2.0**64
        count = min(max(int(share * size / length + draw), least), size // length, starts)
        masks += [[kind, start, start + length] for start in permutation(starts, *named, "starts")[:count].tolist()]
    return np.asarray(masks, dtype=np.int32).reshape(-1, 3)


def masked(features: NDArray[np.float32], masks: NDArray[Any] | None) -> NDArray[np.float32]:
    """The features with 0 where they are masked, in place. Shapes: (bands, frames)."""
    for kind, start, stop in [] if masks is None else masks.tolist():
        if kind == TIME:
            features[:, start:stop] = 0.0
        else:
            features[start:stop] = 0.0
    return features
