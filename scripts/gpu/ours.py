"""A row by tunekit: its own loop, engine, optimizer and objective over a random base."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from measuring import HostMemory, cap_memory, device_peaks, reset_peaks, speeds
from planning import adapter_settings, training_section
from random_model import begin_alike, random_base
from shapes import Row
from work import Windows, objective_of

from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.kernels.liger import use_liger
from tunekit.contracts import Engine
from tunekit.machine.devices import make_devices
from tunekit.memory.blobs import frozen_tensors
from tunekit.memory.checkpointing import prepare_layers
from tunekit.memory.offload import make_store
from tunekit.memory.streaming import stream_base
from tunekit.model.load import LoadedModel
from tunekit.records import StepRecord
from tunekit.training.compiling import compilable, compile_layers
from tunekit.training.engines.choice import make_engine
from tunekit.training.engines.resident import ResidentEngine
from tunekit.training.loop import run_loop
from tunekit.training.optimizers import Group, Optimizer
from tunekit.training.scaling import LossScale
from tunekit.training.state import LoopParts, LoopState
from tunekit.tuned.model import TunedModel


def run_row(row: Row, device: torch.device, plan: dict[str, Any]) -> dict[str, Any]:
    """Build, train as the row's plan says, and say what it took."""
    cap_memory(row, device)
    host, started = HostMemory(), time.monotonic()
    host.start()
    home = device if row.engine == "resident" else torch.device("cpu")
    base = random_base(row.model, row.quantization, device, home)
    checkpointed = plan["checkpointed_layers"]
    parts, state, records = _parts(row, base, checkpointed, device)
    loaded = time.monotonic() - started
    found = reset_peaks(device)
    run_loop(parts, state)
    peaks = device_peaks(device)
    return {
        **found,
        **peaks,
        **speeds(*zip(*((each.tokens, each.supervised_tokens, each.seconds) for each in records), strict=True)),
        "host_anonymous_bytes": host.finish(),
        "losses": [record.loss for record in records],
        "gradient_norms": [record.grad_norm for record in records],
        "load_seconds": loaded,
        "attention": base.facts.attention,
    }


def _parts(
    row: Row, base: LoadedModel, checkpointed: int, device: torch.device
) -> tuple[LoopParts, LoopState, list[StepRecord]]:
    layers = [layer for _, layer in base.family.layers(base.net)]
    frozen = [frozen_tensors(layer) for layer in layers]
    forwards = compilable(layers) if row.compiled else []
    head = base.family.head_name(base.net)
    adapter = attach_adapter(base.net, adapter_settings(row), seed=0, head_name=head, device=device)
    begin_alike(adapter.trained().items())
    store = make_store("auto", device)
    prepare_layers(layers, checkpointed if row.engine == "resident" else 0, store)
    if row.kernels == "liger":
        use_liger(base.net)
    compile_layers(forwards)
    engine: Engine = ResidentEngine(0)
    if row.engine != "resident":
        engine = make_engine(0, stream_base(replace(base, device=device), frozen, row.engine), row.pass_size)
    training = training_section(row)
    groups = [Group(tuple(names), rate, decays) for names, rate, decays in adapter.groups(training)]
    optimizer = Optimizer(training, groups, adapter.trained())
    records: list[StepRecord] = []
    parts = LoopParts(
        model=TunedModel(replace(base, device=device), adapter, store),
        objective=objective_of(row),
        engine=engine,
        optimizer=optimizer,
        devices=make_devices(),
        windows=Windows(row),
        settings=training,
        warmup_steps=0,
        scale=LossScale(False),
        record=lambda record: records.append(record) if isinstance(record, StepRecord) else None,
        save=lambda state: None,
        evaluate=None,
        is_better=lambda value, best: False,
        watched_metric=None,
        saves_best=False,
        patience=None,
        stop_signal=lambda: 0,
        peak_bytes=lambda: 0,
    )
    return parts, LoopState(), records
