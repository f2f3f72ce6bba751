"""What plan says of an adapter's initialisation: what it cannot look at, what it keeps until step 1, and notes.

Comes in: the adapter's settings, the model without weights, targets.  Goes out: problems, bytes, notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunekit.adapters.starts.start import LINEAR, start_module
from tunekit.errors import Problem
from tunekit.model.load import LoadedModel
from tunekit.recipe.section import AdapterSettings, CalibratedStart
from tunekit.records import Target, bytes_text

DECOMPOSITION_BYTES = 4 * 8  # for each number of the largest matrix: it, and what it is decomposed into, in float64
SIMPLE = ("default", "gaussian", "orthogonal")  # which decompose nothing of the base


def calibrated_start(settings: AdapterSettings) -> CalibratedStart | None:
    """The initialisation that looks at the run's own data, if the adapter has one."""
    start = getattr(settings, "start", None)
    return start if isinstance(start, CalibratedStart) else None


def start_problems(settings: AdapterSettings, base: LoadedModel, targets: Sequence[Target]) -> Iterator[Problem]:
    """Layers that the pass before step 1 does not see."""
    start, head = calibrated_start(settings), base.family.head_name(base.net)
    if start is not None and head in [target.name for target in targets]:
        what = (
            f"{start.method} looks at each layer's {start.looks_at}, and '{head}' is only run with the loss, in chunks"
        )
        yield Problem(what, f"leave {head} out of adapter.target_modules, or choose another start", key="adapter.start")


def start_bytes(settings: AdapterSettings, targets: Sequence[Target]) -> int:
    """The most that a start keeps and works with, beside the base; all of it is gone before step 1."""
    start, linear = getattr(settings, "start", None), [target for target in targets if target.kind in LINEAR]
    if start is None or start.method in SIMPLE or not linear:
        return 0
    work = DECOMPOSITION_BYTES * max(target.in_features * target.out_features for target in linear)
    return work + _statistics_bytes(calibrated_start(settings), linear)


def _statistics_bytes(start: CalibratedStart | None, targets: Sequence[Target]) -> int:
    if start is None:
        return 0
    return sum(start_module(start.method).statistics_bytes(start, target) for target in targets)


def start_notes(settings: AdapterSettings, targets: Sequence[Target]) -> Iterator[str]:
    """The pass over the data that will be made."""
    start = calibrated_start(settings)
    if start is not None:
        kept = bytes_text(_statistics_bytes(start, [target for target in targets if target.kind in LINEAR]))
        yield (
            f"start: {start.method} looks at the {start.looks_at} of the first {start.batches:,} micro-batches before "
            f"step 1, and keeps {kept} of them until then"
        )
        if getattr(start, "rho", 1.0) > 1:
            yield f"start: {start.method} decides the ranks; parameters and memory here are those of the recipe's"
