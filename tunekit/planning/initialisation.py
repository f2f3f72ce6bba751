"""Checks an adapter's initialisation (its start) while planning: problems, notes, and the memory that it needs before
step 1."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.read import continued_folder
from tunekit.adapters.method import load_method, needs_reference_state
from tunekit.adapters.starts.start import LINEAR, start_module
from tunekit.contracts import Objective
from tunekit.errors import Problem, TunekitError
from tunekit.model.load import LoadedModel
from tunekit.recipe.bases.section import AdapterSettings, CalibratedStart
from tunekit.records import Target, bytes_text

DECOMPOSITION_BYTES = 4 * 8  # per element of the largest matrix: the matrix and its factors in float64


def initialisation_problems(
    settings: AdapterSettings, base: LoadedModel, targets: Sequence[Target]
) -> Iterator[Problem]:
    """Yields a problem if the initialisation needs statistics of the output head. The pass over the data cannot collect
    them."""
    start, head = settings.calibration, base.family.head_name(base.net)
    if start is not None and head in [target.name for target in targets]:
        what = f"{start.method} needs each layer's {start.looks_at}, but '{head}' is computed in chunks inside the loss"
        yield Problem(
            what, f"leave {head} out of adapter.target_modules, or choose another adapter.start", key="adapter.start"
        )


def continued_problems(settings: AdapterSettings, base: LoadedModel, targets: Sequence[Target]) -> Sequence[Problem]:
    """The problems of the adapter that init_from names: it is not an adapter folder, is damaged, or has an adapter with
    different settings."""
    if settings.init_from is None:
        return ()
    adapter = AttachedAdapter(base.net, settings, load_method(settings.method), list(targets))
    adapter.head_name = base.family.head_name(base.net)
    try:
        config, _ = continued_folder(adapter, Path(settings.init_from))
        config.check_files()
    except TunekitError as error:
        return error.problems
    return ()


def initialisation_bytes(settings: AdapterSettings, targets: Sequence[Target]) -> int:
    """Maximum memory of the adapter's initialisation, without the base. It is freed before step 1."""
    start, linear = settings.initialisation, [target for target in targets if target.kind in LINEAR]
    if start is None or not start.decomposes or not linear:
        return 0
    work = DECOMPOSITION_BYTES * max(target.in_features * target.out_features for target in linear)
    return work + _statistics_bytes(settings.calibration, linear)


def _statistics_bytes(start: CalibratedStart | None, targets: Sequence[Target]) -> int:
    if start is None:
        return 0
    return sum(start_module(start.method).statistics_bytes(start, target) for target in targets)


def initialisation_notes(settings: AdapterSettings, objective: Objective, targets: Sequence[Target]) -> Iterator[str]:
    """Notes about the reference model, and about the pass over the data that initialises the adapter before step 1."""
    if needs_reference_state(objective, settings) and settings.trains_base:
        how = f"to save this memory, use an adapter method such as lora, or {objective.loss.without_reference}"
        kept = "the run stores a copy of the trained weights in float32"
        yield f"the reference model is the base at step 0; {kept}; {how}"
    elif needs_reference_state(objective, settings):
        yield "the reference model is the base with the adapter at step 0; the run stores a frozen copy of this adapter"
    start = settings.calibration
    if start is not None:
        statistics = bytes_text(_statistics_bytes(start, [target for target in targets if target.kind in LINEAR]))
        yield (
            f"adapter.start: before step 1, {start.method} reads the {start.looks_at} of the first {start.batches:,} "
            f"micro-batches and keeps {statistics} of statistics"
        )
        if getattr(start, "rho", 1.0) > 1:
            yield (f"adapter.start: {start.method} will choose the ranks; this plan assumes the recipe's ranks")
