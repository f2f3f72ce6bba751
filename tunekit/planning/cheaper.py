"""Advice for a recipe that needs too much memory: possible changes are simulated, and up to three are listed.

A cheap change costs little quality or speed. `_changes` lists the changes from cheap to costly: from recomputation to
shorter rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from tunekit.contracts import Batch
from tunekit.data.batching.split import cut_batch
from tunekit.model.load import make_meta_model
from tunekit.planning.forecast import Forecast
from tunekit.planning.refusals import device_problems, library_problems
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.recipe.recipe import Recipe
from tunekit.records import ExecutionSettings, bytes_text

SHOWN = 3
Possible = Callable[..., bool]
LEAST_SHARE = 0.01  # changes that save less than this share of the needed memory are not proposed


@dataclass(frozen=True)
class Change:
    """A new value for one key of the recipe. `forecast`, `execution`: apply the change to a Forecast, and to the chosen
    settings."""

    key: str
    value: str | int
    forecast: Callable[[Forecast], Forecast] = lambda forecast: forecast
    execution: Callable[[ExecutionSettings], ExecutionSettings] = lambda execution: execution


def cheapest_changes(
    recipe: Recipe,
    forecast: Forecast,
    refused: Callable[[Recipe], object],
    execution: ExecutionSettings,
    needed: int,
    limit: int,
) -> str:
    """A text that lists up to three changes, cheapest first. A change that saves enough memory alone is preferred.

    `refused`: returns whether the plan would refuse a recipe because of the base. `needed`: the bytes that the run
    needs with `execution`. `limit`: the available bytes.
    """

    def possible(section: str, **values: object) -> bool:
        changed = _changed(recipe, section, **values)
        return changed is not None and not (any(device_problems(changed, forecast.run.device)) or refused(changed))

    changes = (
        (change, _needs([change], forecast, execution)) for change in _changes(recipe, forecast, possible, execution)
    )
    most = (1 - LEAST_SHARE) * needed
    tried = [(change, needs) for change, needs in changes if needs is not None and needs <= most]
    if not tried:
        return "no setting would save enough memory; use a smaller base model, or more memory"
    chosen = sorted(tried, key=lambda one: one[1] > limit)[:SHOWN]  # sorting keeps the order of cost
    chosen.sort(key=tried.index)
    texts = [_text(change, needs, needed, limit) for change, needs in chosen]
    sufficient = any(needs <= limit for _, needs in chosen)
    together = None if sufficient else _needs([change for change, _ in chosen], forecast, execution)
    head = "the cheapest changes: " if len(chosen) > 1 else "the only change that saves memory: "
    tail = "" if together is None or len(chosen) < 2 else f"; together they need {bytes_text(together)}"
    return head + ", ".join(texts) + tail


def _text(change: Change, needs: int, needed: int, limit: int) -> str:
    enough = "" if needs <= limit else ", which is not enough alone"
    return f"{change.key}: {change.value} saves {bytes_text(needed - needs)} (needs {bytes_text(needs)}{enough})"


def _needs(changes: list[Change], forecast: Forecast, execution: ExecutionSettings) -> int | None:
    """Peak memory in bytes if all these changes are made; None if the changed run cannot be simulated."""
    try:
        for change in changes:
            forecast, execution = change.forecast(forecast), change.execution(execution)
        return forecast.peak(execution).total
    except Exception:  # an error in the model's own code, or a value that a section refuses: not proposed
        return None


def _changes(recipe: Recipe, forecast: Forecast, possible: Possible, execution: ExecutionSettings) -> Iterator[Change]:
    """Yields all changes that could save memory for this recipe, cheapest first. `possible`: whether the recipe with
    new values in a section can be run."""
    layers = forecast.base.facts.layers
    if execution.checkpointed_layers < layers:
        every = partial(replace, checkpointed_layers=layers)
        yield Change("memory.gradient_checkpointing", "auto", execution=every)
    if forecast.evaluation_batch is not None and recipe.evaluation.batch_size > 1:
        yield Change("evaluation.batch_size", 1, partial(_with_evaluation_cut, sequences=1))
    if not execution.streamed_head and possible("memory", streamed_head=True):
        yield Change("memory.streamed_head", "true", execution=partial(replace, streamed_head=True))
    yield from _changes_of_base(recipe, forecast, possible)
    training = forecast.run.training
    if training.optimizer == "adamw" and possible("training", optimizer="adamw_8bit"):
        section = training.model_copy(update={"optimizer": "adamw_8bit"})
        yield Change(
            "training.optimizer", "adamw_8bit", lambda old: replace(old, run=replace(old.run, training=section))
        )
    rank = getattr(forecast.run.adapter, "r", None)
    if isinstance(rank, int) and rank > 1 and possible("adapter", r=rank // 2):
        settings = forecast.run.adapter.model_copy(update={"r": rank // 2})
        yield Change("adapter.r", rank // 2, lambda old: replace(old, run=replace(old.run, adapter=settings)))
    yield from _changes_of_rows(recipe, forecast)


def _changes_of_base(recipe: Recipe, forecast: Forecast, possible: Possible) -> Iterator[Change]:
    model = recipe.model
    if forecast.base.facts.dtype == "float32" and possible("model", dtype="bfloat16"):
        yield _base_change("dtype", "bfloat16", forecast.run.device)
    for name in ("int8_weight_only", "nf4"):
        wanted = model.quantization == "none" or (name == "nf4" and model.quantization.startswith("int8"))
        if wanted and possible("model", quantization=name):
            yield _base_change("quantization", name, forecast.run.device)


def _base_change(name: str, value: str, device: torch.device) -> Change:
    def changed(given: Forecast) -> Forecast:
        section = given.run.model.model_copy(update={name: value})
        return replace(given, run=replace(given.run, model=section), base=make_meta_model(section, device=device))

    return Change(f"model.{name}", value, changed)


def _changes_of_rows(recipe: Recipe, forecast: Forecast) -> Iterator[Change]:
    """Yields the change to shorter rows. If the recipe limits micro-batches by tokens, yields the change to smaller
    micro-batches instead."""
    if recipe.training.micro_batch_tokens is not None:
        tokens = recipe.training.micro_batch_tokens // 2
        if len(forecast.largest_batch(None).sequences) > 1:
            yield Change("training.micro_batch_tokens", tokens, _half_the_rows)
        return
    if recipe.data.excess_length == "error":
        return  # the rows that are longer would be refused
    longest = forecast.largest_batch(1).width
    half = longest // 2 - longest // 2 % 8
    if half:
        yield Change("data.max_length", half, lambda given: _cut_to(given, half))


def _changed(recipe: Recipe, section: str, **values: object) -> Recipe | None:
    """The recipe with these new values in this section; None if tunekit does not support them."""
    other = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
    return None if refuse_unsupported(other) or any(library_problems(other)) else other


def _with_evaluation_cut(forecast: Forecast, sequences: int | None = None, size: int | None = None) -> Forecast:
    batch, kind = forecast.evaluation_batch, forecast.run.objective.rows
    cut = None if batch is None else cut_batch(batch, kind, sequences=sequences, size=size)
    return replace(forecast, evaluation_batch=cut)


def _half_the_rows(forecast: Forecast) -> Forecast:
    largest = forecast.largest_batch

    def halved(size: int | None) -> Batch:
        batch = largest(size)
        return cut_batch(batch, forecast.run.objective.rows, sequences=-(-len(batch.sequences) // 2))

    return replace(forecast, largest_batch=halved)


def _cut_to(forecast: Forecast, tokens: int) -> Forecast:
    largest, kind = forecast.largest_batch, forecast.run.objective.rows
    forecast = _with_evaluation_cut(forecast, size=tokens)
    return replace(forecast, largest_batch=lambda size: cut_batch(largest(size), kind, size=tokens))
