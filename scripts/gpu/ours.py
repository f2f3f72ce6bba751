"""Runs a row (a measured run) with tunekit: its own loop, engine, optimizer and objective, on a random base."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import HostMemory, cap_memory, device_peaks, reset_peaks, speeds
from planning import adapter_settings, row_execution, training_section
from random_model import begin_alike, random_base
from shapes import Row
from work import RowSteps, objective_of

from tunekit.adapters.attach import attach_adapter
from tunekit.console import Console
from tunekit.machine.devices import make_devices
from tunekit.machine.signals import StopSignals
from tunekit.model.load import LoadedModel
from tunekit.recipe.data import DataSection
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.output import OutputSection
from tunekit.recipe.recipe import Recipe
from tunekit.records import StepRecord
from tunekit.training.optimizers import make_optimizer
from tunekit.training.run import Run
from tunekit.training.session import Session
from tunekit.training.state import LoopState
from tunekit.training.streaming import make_engine
from tunekit.tuned.network import prepare_network


def run_row(
    row: Row, device: torch.device, plan: dict[str, Any], keep: Callable[[dict[str, Any]], None] = lambda part: None
) -> dict[str, Any]:
    """Build the model, train as the row's plan states, and return the measurements. `keep` is called with the load time
    and the steps so far."""
    cap_memory(row, device)
    host, started = HostMemory(), time.monotonic()
    host.start()
    home = device if row.engine == "resident" else torch.device("cpu")
    base = random_base(row.model, row.quantization, device, home)
    checkpointed = plan["checkpointed_layers"]
    run, records = _run(row, base, checkpointed, device, keep)
    loaded = time.monotonic() - started
    found = reset_peaks(device)
    keep({"load_seconds": loaded, "attention": base.facts.attention, **found})
    run.train()
    peaks = device_peaks(device)
    return {
        **found,
        **peaks,
        **speeds(*zip(*((each.tokens, each.supervised_tokens, each.seconds) for each in records), strict=True)),
        "host_anonymous_bytes": host.finish(),
        "load_seconds": loaded,
        "attention": base.facts.attention,
        **_curve(records),
    }


def _curve(records: list[StepRecord]) -> dict[str, Any]:
    """The losses, gradient norms and seconds of all steps."""
    return {
        "losses": [record.loss for record in records],
        "gradient_norms": [record.grad_norm for record in records],
        "step_seconds": [record.seconds for record in records],
    }


def _run(
    row: Row, base: LoadedModel, checkpointed: int, device: torch.device, keep: Callable[[dict[str, Any]], None]
) -> tuple[Run, list[StepRecord]]:
    base = replace(base, device=device)  # of a streamed one, the layers stay where they are
    choice = row_execution(row, base.text.vocabulary_size, checkpointed)
    head = base.family.head_name(base.net)
    attach = partial(attach_adapter, base.net, adapter_settings(row), seed=0, head_name=head, device=device)
    model = prepare_network(base, choice, attach)
    assert model.adapter is not None
    begin_alike(model.adapter.trained().items())
    training = training_section(row)
    records: list[StepRecord] = []

    def record(each: Any) -> None:
        if isinstance(each, StepRecord):
            records.append(each)
            keep(_curve(records) | device_peaks(device))

    recipe = Recipe(
        model=ModelSection(name_or_path=row.model),
        data=DataSection.model_validate({"train": [{"path": "rows.jsonl"}]}),
        training=training,
        output=OutputSection(dir="no-run"),
    )
    session = Session(LoadedRecipe(recipe, Path("recipe.yaml")), make_devices(), Console(enabled=False), StopSignals())
    run = Run(
        session,
        model,
        objective_of(row),
        make_engine(model),
        make_optimizer(training, model.adapter),
        RowSteps(row),
        training,
        EvaluationSection(),
        0,
        LoopState(),
        micro_batches_per_pass=row.pass_size,
    )
    run.record, run.save = record, lambda: None  # type: ignore[method-assign]
    return run, records
