"""Buckets: the sizes at which pictures of several aspect ratios are trained on.

A picture's size goes in, its bucket's comes out.  Source: diffusers' training_utils (generate_aspect_ratio_buckets,
find_nearest_bucket), but that small pictures are made larger, and that nearness is a factor of the ratio alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunekit.errors import Problem

Size = tuple[int, int]  # height and width in pixels
RATIOS = ((1, 1), (4, 5), (2, 3), (3, 4), (9, 16), (1, 2))  # of `auto`, each upright and lying
KEY = "objective.aspect_ratio_buckets"


def made_buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """One of each ratio, of about as many pixels as a square of the resolution, sides being multiples."""
    sizes = dict[float, Size]()
    for one, other in RATIOS:
        sides = (resolution * math.sqrt(one / other), resolution * math.sqrt(other / one))
        short, long = (max(multiple, round(side / multiple) * multiple) for side in sides)
        for size in ((short, long), (long, short)):
            sizes.setdefault(size[0] / size[1], size)
    return tuple(sizes.values())


def nearest_bucket(size: Sequence[int], buckets: Sequence[Size]) -> Size:
    """The one whose aspect ratio is least away, by what factor; the first of equals."""
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: round(abs(math.log(ratio * bucket[1] / bucket[0])), 9))


def bucket_problems(buckets: Sequence[Size], multiple: int, most: int | None) -> list[Problem]:
    """Sizes that the denoiser cannot take, and those to which no picture would go. `most`: pixels of a side."""
    found, ratios = [], dict[float, Size]()
    for size in buckets:
        if any(side % multiple for side in size):
            what = f"{list(size)}: a side is no multiple of {multiple}, by which the denoiser divides it"
            found.append(Problem(what, "write sides that are", key=KEY))
        if most is not None and max(size) > most:
            what = f"{list(size)}: the denoiser has positions for {most} pixels of a side"
            found.append(Problem(what, "write smaller sides, or for auto a smaller objective.resolution", key=KEY))
        if (same := ratios.setdefault(size[0] / size[1], size)) is not size:
            what = f"{list(size)} has the aspect ratio of {list(same)}, so that no image would go to it"
            found.append(Problem(what, "leave one out", key=KEY))
    return found
