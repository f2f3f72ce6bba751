"""SpecAugment: each step masks ranges of a recording's frames and frequencies. The masks depend only on (seed, step,
row)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunekit.contracts import Row
from tunekit.data.batching.order import draw_raw, permutation
from tunekit.recipe.bases.spec_augment_settings import SpecAugmentSettings

TIME, BANDS = 0, 1


def drawn_masks(settings: SpecAugmentSettings, row: Row, bands: int, key: tuple[int, ...]) -> NDArray[np.int32]:
    """Masks of shape (masks, 3): each mask has a kind (0 for frames, 1 for frequencies), a start, and an end
    (exclusive). `key`: seed, step, row.
    The number of masks is floor(prob * size / length + u), with a random u from [0, 1). `size` counts frames without
    padding. Source: Park et al. 2019; the numbers agree with transformers' _compute_mask_indices, which Whisper
    uses."""
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
    """Set masked values of the features to 0 in place, and return the features. Shapes: (bands, frames)."""
    for kind, start, stop in [] if masks is None else masks.tolist():
        if kind == TIME:
            features[:, start:stop] = 0.0
        else:
            features[start:stop] = 0.0
    return features
