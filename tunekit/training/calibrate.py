"""Collects statistics of layers' inputs and gradients in the run's first batches, for calibrated initialisations. The
base is not changed."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.starts.start import LINEAR, LayerActivations, start_module
from tunekit.contracts import IGNORED, Batch, Companion, Objective, StepBatches, StepSource
from tunekit.data.batching.pad import real_positions
from tunekit.errors import RecipeError
from tunekit.evaluation.scores import undisturbed
from tunekit.machine.devices import forked_random
from tunekit.model.load import LoadedModel
from tunekit.recipe.bases.section import CalibratedStart
from tunekit.records import JsonObject, Target
from tunekit.training.engine import Engine, StepWork
from tunekit.tuned.model import ModelRun, TunedModel

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
