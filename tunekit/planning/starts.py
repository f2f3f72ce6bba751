"""What plan says of a start that looks at something: what it cannot see, and what it keeps until step 1.

Comes in: the adapter's settings, the model without weights, targets.  Goes out: problems, bytes, notes.  Next: plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tunekit.adapters.starts.start import LINEAR, start_module
from tunekit.errors import Problem
from tunekit.model.load import LoadedModel
from tunekit.recipe.section import CalibratedStart
from tunekit.records import Target, bytes_text

DECOMPOSITION_BYTES = 4 * 8  # for each number of the largest matrix: it, and what it is decomposed into, in float64
SIMPLE = ("default", "gaussian", "orthogonal")  # which decompose nothing of the base


def start_problems(settings: Any, base: LoadedModel, targets: Sequence[Target]) -> Iterator[Problem]:
    """Layers that the pass before step 1 does not see."""
    start, head = getattr(settings, "start", None), base.family.head_name(base.net)
    if isinstance(start, CalibratedStart) and head in [target.name for target in targets]:
        what = (
            f"{start.method} looks at each layer's {start.looks_at}, and '{head}' is only run with the loss, in chunks"
        )
        yield Problem(what, f"leave {head} out of adapter.target_modules, or choose another start", key="adapter.start")


def start_bytes(settings: Any, targets: Sequence[Target]) -> int:
    """The most that a start keeps and works with, beside the base; all of it is gone before step 1."""
    start, linear = getattr(settings, "start", None), [target for target in targets if target.kind in LINEAR]
    if start is None or start.method in SIMPLE or not linear:
        return 0
    work = DECOMPOSITION_BYTES * max(target.in_features * target.out_features for target in linear)
    return work + _statistics_bytes(start, linear)


def _statistics_bytes(start: Any, targets: Sequence[Target]) -> int:
    if not isinstance(start, CalibratedStart):
        return 0
    return sum(start_module(start.method).statistics_bytes(start, target) for target in targets)


def start_notes(settings: Any, targets: Sequence[Target]) -> Iterator[str]:
    """The pass over the data that will be made."""
    start = getattr(settings, "start", None)
    if isinstance(start, CalibratedStart):
        kept = bytes_text(_statistics_bytes(start, [target for target in targets if target.kind in LINEAR]))
        yield (
            f"start: {start.method} looks at the {start.looks_at} of the first {start.batches:,} micro-batches before "
            f"step 1, and keeps {kept} of them until then"
        )
        if getattr(start, "rho", 1.0) > 1:
            yield f"start: {start.method} decides the ranks; parameters and memory here are those of the recipe's"
