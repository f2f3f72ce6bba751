"""Attaches the adapter and initialises it: with default values, from the base's unquantized weights, from a trained
adapter, or from data (a calibration): statistics of layers' inputs and gradients in the run's first batches, which do
not change the base.

A resumed run restores its values from the checkpoint, so the data is not read again.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.base import slot_count
from tunekit.adapters.folder.read import load_into
from tunekit.adapters.method import load_method
from tunekit.adapters.starts.start import LINEAR, LayerActivations, initialise_all, start_module
from tunekit.adapters.targets import find_targets
from tunekit.contracts import IGNORED, Batch, Companion, Objective, StepBatches, StepSource
from tunekit.data.batching.pad import real_positions
from tunekit.errors import RecipeError
from tunekit.evaluation.scores import undisturbed
from tunekit.machine.devices import Devices, forked_random
from tunekit.model.load import LoadedModel
from tunekit.recipe.bases.section import AdapterSettings, CalibratedStart
from tunekit.records import JsonObject, Target
from tunekit.training.engine import Engine, StepWork
from tunekit.training.session import Planned
from tunekit.tuned.model import ModelRun, TunedModel
from tunekit.tuned.originals import originals

Layout = Sequence[Mapping[str, Sequence[int]]]  # a checkpoint's layout, for each group: name -> [start, *shape]


def initialise_adapter(
    base: LoadedModel,
    planned: Planned,
    *,
    seed: int,
    devices: Devices,
    resumed: Layout | None,
    companions: Mapping[str, Companion],
) -> tuple[AttachedAdapter, JsonObject | None]:
    """Attach the adapter and initialise it. Returns the adapter and, if the initialisation read data (a calibration),
    its cost.

    `resumed`: the layout of the checkpoint that will be restored later; None for a new run.
    Raises: RecipeError, DataError or ModelError if something that the initialisation needs is missing.
    """
    settings, head_name, start = planned.adapter, base.family.head_name(base.net), planned.adapter.calibration
    attach = partial(attach_adapter, base.net, settings, seed=seed, head_name=head_name, device=base.device)
    facts = None
    if start is None:
        adapter, other = attach(), settings.initialisation
        if other is not None and other.looks_at == "original" and resumed is None:
            initialise_all(adapter.layers, seed, originals(adapter, planned.model))
            _copy_from_main(adapter, devices)
    else:
        targets = find_targets(base.net, settings, head_name=head_name)
        if resumed is not None:
            ranks = {target.name: _resumed_rank(target, resumed) for target in targets}
            adapter = attach(targets=with_ranks(settings, targets, ranks))
        else:
            steps, objective = planned.rows.steps(planned.batch_settings), planned.rows.objective
            evidence, facts = calibrate(base, start, targets, steps, objective, seed=seed, companions=companions)
            share = getattr(start_module(start.method), "share_ranks", None)
            if share is not None:
                targets = with_ranks(settings, targets, devices.from_main(share(start, targets, evidence)))
            adapter = attach(targets=targets)
            initialise_all(adapter.layers, seed, evidence.get)
            _copy_from_main(adapter, devices)
    if settings.init_from is not None and resumed is None:
        load_into(adapter, Path(settings.init_from), base_fingerprint=base.fingerprint)
    return adapter, facts


def with_ranks(settings: AdapterSettings, targets: Sequence[Target], ranks: Mapping[str, int | None]) -> list[Target]:
    """A copy of the targets (adapted layers) with new ranks. `ranks`: the rank by layer name; rank 0 removes the
    target. A target without a rank in `ranks` stays unchanged."""
    layer, start = load_method(settings.method).layer, settings.initialisation
    assert layer is not None
    assert start is not None
    changed: list[Target] = []
    for target in targets:
        rank = ranks.get(target.name)
        if rank is None or rank == target.r or target.r is None:
            changed.append(target)
        elif rank:
            alpha = start_module(start.method).alpha_of(settings, target, rank)
            new = replace(target, r=rank, alpha=alpha)
            changed.append(replace(new, trainable_parameters=slot_count(layer.slots(settings, new).values())))
    return changed


def _resumed_rank(target: Target, layout: Layout) -> int | None:
    """The rank of a layer in a checkpoint; 0 if the checkpoint does not contain this layer. None for a kind of layer
    whose rank no initialisation changes."""
    if target.kind not in ("linear", "conv1d"):
        return None
    shapes = [group[f"{target.name}.lora_B.weight"] for group in layout if f"{target.name}.lora_B.weight" in group]
    return shapes[0][-1] if shapes else 0


def _copy_from_main(adapter: AttachedAdapter, devices: Devices) -> None:
    """Copy the adapter's values from the main rank to all other ranks. Matrix decompositions on two devices may differ
    by a sign."""
    if devices.world == 1:
        return
    with torch.no_grad():
        tensors = list(adapter.state().values())
        for tensor in tensors:
            tensor.mul_(float(devices.is_main))
        devices.sum_in_place(tensors)


HALF_SCALE = 1024.0  # loss scale for float16, whose gradients would underflow


class StatisticsCollector:
    """Collects statistics of the inputs (and gradients) of every observed layer, for the current micro-batch."""

    def __init__(self, start: CalibratedStart, targets: Sequence[Target]) -> None:
        make = start_module(start.method).STATISTICS
        self.statistics = {target.name: make(start, target) for target in targets if target.kind in LINEAR}
        self.reached: set[str] = set()
        self.scale = 1.0
        self.batch: Batch | None = None

    def add(self, name: str, inputs: Tensor, gradients: Tensor | None = None) -> None:
        """Add one layer's inputs (..., I) in the current micro-batch, and the gradients (..., O) of its output."""
        assert self.batch is not None
        with torch.no_grad():
            self.statistics[name].add(_layer_activations(self.batch, inputs.detach(), gradients, self.scale))
        self.reached.add(name)


def _layer_activations(batch: Batch, inputs: Tensor, gradients: Tensor | None, scale: float) -> LayerActivations:
    """The activations of a layer at real tokens, without padding. For a layer of an expert, all inputs are used,
    because they cannot be assigned to the batch's rows."""
    flat = inputs.reshape(-1, inputs.shape[-1]).float()  # (N, I)
    of_output = None if gradients is None else gradients.reshape(-1, gradients.shape[-1]).float() / scale  # (N, O)
    real = real_positions(batch.lengths)  # (B, T)
    if len(flat) != real.numel():
        rows = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        return LayerActivations(flat, rows, torch.ones_like(rows, dtype=torch.bool), of_output)
    labels = batch.targets.get("labels")
    supervised = labels != IGNORED if labels is not None and labels.shape == real.shape else real  # (B, T)
    rows = torch.arange(len(real))[:, None].expand_as(real)  # (B, T)
    rows, supervised = (part[real].to(flat.device) for part in (rows, supervised))
    is_real = real.reshape(-1).to(flat.device)  # (N,)
    return LayerActivations(flat[is_real], rows, supervised, None if of_output is None else of_output[is_real])


@contextmanager
def _watching(net: nn.Module, watch: StatisticsCollector, gradients: bool) -> Iterator[None]:
    """A context manager: inside the block, hooks on every observed layer collect statistics."""
    with ExitStack() as hooks:
        for name in watch.statistics:
            module = net.get_submodule(name)
            if gradients:
                hooks.enter_context(module.register_forward_pre_hook(_begin_gradients))
            hooks.enter_context(module.register_forward_hook(_hook(watch, name, gradients)))
        yield


def _begin_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make the inputs of the first observed layers require a gradient. Otherwise no tensor of a frozen base would
    require one."""
    if not torch.is_grad_enabled() or inputs[0].requires_grad:
        return None
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _hook(
    watch: StatisticsCollector, name: str, gradients: bool
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def observe(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not gradients:
            watch.add(name, inputs[0])
        elif output.requires_grad:  # skips the first forward of a recomputed layer
            output.register_hook(lambda gradient: watch.add(name, inputs[0], gradient))  # type: ignore[no-untyped-call]

    return observe


def first_steps(steps: StepSource, batches: int) -> Iterator[StepBatches]:
    """Yields the run's first steps, with `batches` micro-batches in total. The last step may be cut short. A short
    run has fewer micro-batches."""
    left = batches
    for step in steps.after(0):
        if len(step.batches) >= left:
            yield StepBatches(step.step, step.epoch, step.indices[:left], step.batches[:left])
            return
        left -= len(step.batches)
        yield step


def calibrate(
    base: LoadedModel,
    start: CalibratedStart,
    targets: Sequence[Target],
    steps: StepSource,
    objective: Objective,
    *,
    seed: int,
    companions: Mapping[str, Companion],
) -> tuple[JsonObject, JsonObject]:
    """Run the calibration. Returns the statistics of each layer, by module name, and the cost of the calibration.

    Raises: RecipeError if a layer gets no tokens.
    """
    started = time.monotonic()
    model, watch = TunedModel(base, None, companions=companions), StatisticsCollector(start, targets)
    backward = start.looks_at == "gradients"
    run = ModelRun(model, objective.rows)
    chosen = list[StepBatches]()
    for step in first_steps(steps, start.batches):
        chosen.append(objective.prepare_step(run, step, chosen[-1] if chosen else None))
    batches = [batch for step in chosen for batch in step.batches]
    with _watching(base.net, watch, backward):
        if backward:
            _run_backward(model, watch, objective, chosen, seed)
        else:
            _run_forward(model, watch, batches)
    unreached = sorted(watch.statistics.keys() - watch.reached)
    if unreached:
        what = (
            f"{start.method} needs the {start.looks_at} of '{unreached[0]}', but no token of the first batches passes "
            "through this module"
        )
        raise RecipeError(
            what, "remove this module from adapter.target_modules, or choose another adapter.start", key="adapter.start"
        )
    facts = {
        "start": start.method,
        "micro_batches": len(batches),
        "tokens": sum(batch.tokens for batch in batches),
        "forward_passes": len(batches),
        "backward_passes": len(batches) if backward else 0,
    }
    evidence = {name: statistics.finish() for name, statistics in watch.statistics.items()}
    return evidence, facts | {"seconds": round(time.monotonic() - started, 3)}


def _run_forward(model: TunedModel, watch: StatisticsCollector, batches: Sequence[Batch]) -> None:
    with undisturbed(model):
        for batch in batches:
            watch.batch = batch
            model.output(batch.inputs)  # for a language model, last hidden states without logits


def _run_backward(
    model: TunedModel, watch: StatisticsCollector, objective: Objective, steps: Sequence[StepBatches], seed: int
) -> None:
    """Compute the gradient of the mean loss over all batches of `steps`, one micro-batch at a time."""
    engine, batches = Engine(), [batch for step in steps for batch in step.batches]
    watch.scale = HALF_SCALE if model.base.dtype == torch.float16 else 1.0
    units = sum(map(objective.loss.units, batches), torch.zeros(1, dtype=torch.float64))
    with forked_random(model.device), model.training_mode(True):
        for step in steps:
            for index, batch in zip(step.indices, step.batches, strict=True):
                watch.batch = batch
                one = StepBatches(step.step, step.epoch, (index,), (batch,))
                [result] = engine.run([StepWork(model, objective, one, units, seed, loss_scale=watch.scale)])
                result.checked()
