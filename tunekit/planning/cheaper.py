"""Advice for a recipe that needs too much memory: possible changes are simulated, and up to three are listed.

A cheap change costs little quality or speed. `_changes` lists the changes from cheap to costly: from recomputation to
shorter rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tunekit.contracts import Batch
from tunekit.data.batching.split import cut_batch
from tunekit.model.load import make_meta_model
from tunekit.planning.checks import device_problems, library_problems
from tunekit.planning.forecast import Forecast
from tunekit.planning.prepared import Prepared
from tunekit.planning.tiers import allowed_tiers
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.recipe.recipe import Recipe
from tunekit.records import ExecutionSettings, bytes_text

SHOWN = 3
LEAST_SHARE = 0.01  # changes that save less than this share of the needed memory are not proposed


@dataclass(frozen=True)
class Variant:
    """A run with other values of some keys: its recipe, and what predicts its memory."""

    recipe: Recipe
    forecast: Forecast
    execution: ExecutionSettings


Change = tuple[str, str | int, Callable[[Variant], Variant]]  # key, value, and a function that makes the change


def cheapest_changes(prepared: Prepared, recipe: Recipe, execution: ExecutionSettings, needed: int, limit: int) -> str:
    """A text that lists up to three changes, cheapest first. A change that saves enough memory alone is preferred.

    `needed`: the bytes that the run needs with `execution`. `limit`: the available bytes.
    """
    run = Variant(recipe, prepared.forecast, execution)
    changes = ((change, _needs([change], run)) for change in _changes(run, partial(_possible, prepared, recipe)))
    most = (1 - LEAST_SHARE) * needed
    tried = [(change, needs) for change, needs in changes if needs is not None and needs <= most]
    if not tried:
        return "no setting would save enough memory; use a smaller base model, or more memory"
    chosen = sorted(tried, key=lambda one: one[1] > limit)[:SHOWN]  # sorting keeps the order of cost
    chosen.sort(key=tried.index)
    texts = [_text(change, needs, needed, limit) for change, needs in chosen]
    sufficient = any(needs <= limit for _, needs in chosen)
    together = None if sufficient else _needs([change for change, _ in chosen], run)
    head = "the cheapest changes: " if len(chosen) > 1 else "the only change that saves memory: "
    tail = "" if together is None or len(chosen) < 2 else f"; together they need {bytes_text(together)}"
    return head + ", ".join(texts) + tail


def _text(change: Change, needs: int, needed: int, limit: int) -> str:
    enough = "" if needs <= limit else ", which is not enough alone"
    return f"{change[0]}: {change[1]} saves {bytes_text(needed - needs)} (needs {bytes_text(needs)}{enough})"


def _needs(changes: Sequence[Change], run: Variant) -> int | None:
    """Peak memory in bytes if all these changes are made; None if the changed run cannot be simulated."""
    try:
        for _, _, make in changes:
            run = make(run)
        return run.forecast.peak(run.execution).total
    except Exception:  # an error in the model's own code, or a value that a section refuses: not proposed
        return None


def _changes(run: Variant, possible: Callable[[Recipe], bool]) -> Iterator[Change]:
    """Yields all changes that could save memory for this recipe, cheapest first. `possible`: whether a changed recipe
    can be run."""
    recipe, forecast, layers = run.recipe, run.forecast, run.forecast.base.facts.layers
    if run.execution.checkpointed_layers < layers:
        yield "memory.gradient_checkpointing", "auto", partial(_with_execution, checkpointed_layers=layers)
    if forecast.evaluation_batch is not None and recipe.evaluation.batch_size > 1:
        yield "evaluation.batch_size", 1, partial(_with_evaluation_cut, sequences=1)
    if not run.execution.streamed_head and possible(_changed(recipe, "memory", "streamed_head", True)):
        yield "memory.streamed_head", "true", partial(_with_execution, streamed_head=True)
    for section, key, value in _other_values(run):
        if possible(_changed(recipe, section, key, value)):
            yield f"{section}.{key}", value, partial(_with_value, section=section, key=key, value=value)
    yield from _changes_of_rows(recipe, forecast)


def _other_values(run: Variant) -> Iterator[tuple[str, str, str | int]]:
    """Sections, keys and values that could save memory, cheapest first."""
    model, rank = run.recipe.model, getattr(run.recipe.adapter, "r", None)
    if run.forecast.base.facts.dtype == "float32":
        yield "model", "dtype", "bfloat16"
    if model.quantization == "none":
        yield "model", "quantization", "int8_weight_only"
    if model.quantization == "none" or model.quantization.startswith("int8"):
        yield "model", "quantization", "nf4"
    if run.recipe.training.optimizer == "adamw":
        yield "training", "optimizer", "adamw_8bit"
    if isinstance(rank, int) and rank > 1:
        yield "adapter", "r", rank // 2


def _changes_of_rows(recipe: Recipe, forecast: Forecast) -> Iterator[Change]:
    """Yields the change to shorter rows. If the recipe limits micro-batches by tokens, yields the change to smaller
    micro-batches instead."""
    if recipe.training.micro_batch_tokens is not None:
        if len(forecast.largest_batch(None).sequences) > 1:
            yield "training.micro_batch_tokens", recipe.training.micro_batch_tokens // 2, _half_the_rows
        return
    if recipe.data.excess_length == "error":
        return  # the rows that are longer would be refused
    longest = forecast.largest_batch(1).width
    half = longest // 2 - longest // 2 % 8
    if half:
        yield "data.max_length", half, partial(_cut_to, tokens=half)


def _changed(recipe: Recipe, section: str, key: str, value: str | int) -> Recipe:
    """The recipe with this value."""
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={key: value})})


def _possible(prepared: Prepared, recipe: Recipe, changed: Recipe) -> bool:
    """Whether tunekit supports the changed recipe on this machine, and the base allows what it requests."""
    if refuse_unsupported(changed) or any(library_problems(changed)):
        return False
    refused = len(allowed_tiers(prepared, changed)[1]) > len(allowed_tiers(prepared, recipe)[1])
    return not refused and not any(device_problems(changed, prepared.resources.device))


def _with_value(run: Variant, section: str, key: str, value: str | int) -> Variant:
    recipe, simulated = _changed(run.recipe, section, key, value), run.forecast.run
    base = make_meta_model(recipe.model, device=simulated.device) if section == "model" else simulated.base
    simulated = replace(simulated, base=base, adapter=recipe.adapter, training=recipe.training)
    return replace(run, recipe=recipe, forecast=replace(run.forecast, run=simulated))


def _with_execution(run: Variant, **values: int) -> Variant:
    return replace(run, execution=replace(run.execution, **values))  # type: ignore[arg-type]


def _with_evaluation_cut(run: Variant, sequences: int | None = None, size: int | None = None) -> Variant:
    batch, kind = run.forecast.evaluation_batch, run.forecast.run.objective.rows
    cut = None if batch is None else cut_batch(batch, kind, sequences=sequences, size=size)
    return replace(run, forecast=replace(run.forecast, evaluation_batch=cut))


def _half_the_rows(run: Variant) -> Variant:
    largest, kind = run.forecast.largest_batch, run.forecast.run.objective.rows

    def halved(size: int | None) -> Batch:
        batch = largest(size)
        return cut_batch(batch, kind, sequences=-(-len(batch.sequences) // 2))

    return replace(run, forecast=replace(run.forecast, largest_batch=halved))


def _cut_to(run: Variant, tokens: int) -> Variant:
    largest, kind = run.forecast.largest_batch, run.forecast.run.objective.rows
    run = _with_evaluation_cut(run, size=tokens)
    shorter = replace(run.forecast, largest_batch=lambda size: cut_batch(largest(size), kind, size=tokens))
    return replace(run, forecast=shorter)
