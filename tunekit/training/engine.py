"""The engine: forward and backward of one optimizer step. It adds the gradient of (sum of losses / units) to the flat
gradient buffers.

This engine is for a base whose layers are all on the device: one micro-batch runs after another. streaming.py has the
engine for layers that are copied to the device one by one. A micro-batch that runs out of memory is split
(memory/splitting.py), which changes the order of sums and, with dropout, the masks. The preparation of a step
(tuned/model.py) and an evaluation (evaluation/scores.py) are split too; elsewhere, run_files.py ends the run. run.py
clips the gradient and updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.contracts import Batch, ModelOutput, Objective, Read, StepBatches, Sums
from tunekit.data.batching.pad import real_positions
from tunekit.errors import AdapterError, is_out_of_memory, listed
from tunekit.machine.cpu_times import CpuTimes, cpu_times
from tunekit.machine.devices import Devices
from tunekit.machine.placing import to_device
from tunekit.memory.splitting import PIECE_STRIDE, Splitting, first_line
from tunekit.model.call import AFTER_LAYERS, OUTSIDE_LAYERS, Call, calling, current_call, seed_layer
from tunekit.model.router_loss import ROUTER_LOSS, Routing
from tunekit.tuned.model import ModelRun, TunedModel


@dataclass(frozen=True, eq=False)
class StepWork:
    """Everything that the engine needs to run one step of one run.

    `batches`: this rank's prepared micro-batches. `units`: (K,), the divisor of the step's loss over all ranks.
    `micro_batches`: the step's number of micro-batches over all ranks; loss terms per step are averaged over them.
    `watches_gradients`: whether the result names the tensors that a gradient reached.
    `splitting`: how micro-batches that run out of memory are split; None: the error is the result.
    `micro_batches_per_pass`: how many micro-batches pass through a streamed layer before the next layer is copied.
    """

    model: TunedModel
    objective: Objective
    batches: StepBatches
    units: Tensor
    seed: int
    micro_batches: int = 1
    loss_scale: float = 1.0  # for float16; multiplies the loss before the backward pass
    watches_gradients: bool = False
    splitting: Splitting | None = None
    micro_batches_per_pass: int = 1

    def parts(self) -> list[MicroBatchPart]:
        """All micro-batches in order. Those that are as large as one that ran out of memory are split."""
        parts = []
        for index, batch in zip(self.batches.indices, self.batches.batches, strict=True):
            pieces = [batch] if self.splitting is None else self.splitting.pieces(self.objective.rows, batch)
            divisor = self.micro_batches * len(pieces)
            parts += [MicroBatchPart(piece, index, number, divisor) for number, piece in enumerate(pieces)]
        return parts


@dataclass(eq=False)
class StepResult:
    """The result of a StepWork, on the device: `total`, this rank's sum of losses / units, (K,) float64; the loss of
    each micro-batch, which locates the rows of a NaN; and the sums of logged values.

    `reached`: kinds of trained tensors that a gradient reached, if the work watches them. `error`: why there is no
    result.
    """

    total: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    losses: Sequence[Tensor] = ()
    metrics: Sums = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    times: CpuTimes = field(default_factory=CpuTimes)
    error: Exception | None = None

    def checked(self) -> StepResult:
        """This result. Raises: its error."""
        if self.error is not None:
            raise self.error
        return self


@dataclass(frozen=True)
class MicroBatchPart:
    """A micro-batch, or a part of a split micro-batch. `index`: the micro-batch's index in the step. `number`: the
    part's index in the micro-batch."""

    batch: Batch
    index: int
    number: int
    divisor: int  # of per-step terms: the step's micro-batches times the parts of this one


class StepAttempt:
    """One attempt to run a StepWork: the sums of its losses and logged values so far."""

    def __init__(self, work: StepWork) -> None:
        self.work, self.parts = work, work.parts()
        self.units = to_device(work.units, work.model.device)
        self.losses = {index: torch.zeros_like(self.units) for index in work.batches.indices}  # (K,) each
        self.metrics: Sums = {}
        self.reached: set[str] = set()

    def call(self, part: MicroBatchPart) -> Call:
        """The settings (Call) of a part's forward. Each part of a split micro-batch gets different random numbers."""
        micro_batch = part.index + part.number * PIECE_STRIDE
        return Call(step=self.work.batches.step, micro_batch=micro_batch, seed=self.work.seed, seeded=True)

    def training_call(self, part: MicroBatchPart) -> Call:
        """The Call of a part's forward with the loss of its routers, if the run has one."""
        router_loss = self.work.model.router_loss
        if router_loss is None:
            return self.call(part)
        return replace(self.call(part), routing=Routing(router_loss, real_positions(part.batch.line_lengths)))

    def watching(self) -> AbstractContextManager[None]:
        """A context manager: `reached` gets the trained tensors that a gradient reaches, if the work watches them."""
        adapter = self.work.model.adapter
        if adapter is None or not self.work.watches_gradients:
            return nullcontext()
        return watching_gradients(adapter, self.reached)

    def computing(self, part: MicroBatchPart) -> None:
        """Remember which part is running. If memory runs out, this one is split."""
        if self.work.splitting is not None:
            self.work.splitting.running = part.batch

    def backward(self, part: MicroBatchPart, output: ModelOutput, penalty: Callable[[], Tensor | None]) -> None:
        """Add a part's loss to the sums, and run its backward pass."""
        work = self.work
        seed_layer(current_call(), AFTER_LAYERS)
        loss = work.objective.loss.loss(output, part.batch)
        del output
        value = (loss.total / self.units.to(loss.total.dtype)).sum()
        if (term := penalty()) is not None:
            value = value + term / part.divisor
        if (routing := current_call().routing) is not None:
            routing.add()
            router_loss = routing.loss() / part.divisor
            value = value + router_loss
            loss.metrics[ROUTER_LOSS] = router_loss.detach() * self.units.sum()
        (value * work.loss_scale).backward()  # type: ignore[no-untyped-call]
        self.losses[part.index] += loss.total.detach().to(self.units.dtype)
        for name, metric in loss.metrics.items():
            self.metrics[name] = self.metrics[name] + metric if name in self.metrics else metric

    def read(self, part: MicroBatchPart, output: ModelOutput, read: Read) -> Tensor:
        """The values that `read` computes from a part's output, with the seed that the part's loss will have."""
        seed_layer(current_call(), AFTER_LAYERS)
        return read(output, part.batch)

    def result(self, times: CpuTimes) -> StepResult:
        """The result of a successful attempt. `times`: its CPU times."""
        losses, total = list(self.losses.values()), torch.zeros_like(self.units)
        for each in losses:
            total += each / self.units
        return StepResult(total, losses, self.metrics, self.reached, times)


class Engine:
    """Runs steps. It keeps nothing that belongs to a run, so that several runs can use one engine."""

    def run(self, works: Sequence[StepWork]) -> list[StepResult]:
        """Run the forward and backward of these steps, each of another run. Returns a result or an error for each.

        The gradients must be zero before the call, because a failed attempt sets them to zero.
        """
        return [self._run_alone(work) for work in works]

    def score(self, work: StepWork, read: Read) -> list[Tensor]:
        """The values that `read` computes from each micro-batch's output, on the device and without gradient. They are
        the values that `run` computes later from the same work, because parts, modes and seeds are the same.

        `read` returns one value for each row or token, so that the values of the parts of a micro-batch follow each
        other. If memory runs out, the micro-batch is split, here and in `run`.
        Raises: ResourceError if a single document does not fit into memory (only with `splitting`).
        """
        model = work.model
        while True:
            attempt = StepAttempt(work)
            try:
                with torch.no_grad(), model.training_mode(True), model.unchanged_weights():
                    values = list(zip(attempt.parts, self._read_outputs(attempt, read), strict=True))
                of_index = [[value for part, value in values if part.index == index] for index in work.batches.indices]
                return [torch.cat(some) for some in of_index]
            except Exception as error:
                if work.splitting is None or not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Not inside `except`: the error keeps the failed attempt's tensors alive there.
            work.splitting.shrink(work.objective.rows, reason, work.batches.step + 1)

    def _run_alone(self, work: StepWork) -> StepResult:
        """Run one work. If memory runs out, its gradient is set to zero, and all its micro-batches run again in smaller
        parts. So no second copy of the gradient is needed."""
        while True:
            attempt, started = StepAttempt(work), cpu_times()
            try:
                with work.model.unchanged_weights(), work.model.clearing_on_failure(), attempt.watching():
                    self._compute(attempt)
                return attempt.result(cpu_times().since(started))
            except Exception as error:
                if work.splitting is None or not is_out_of_memory(error):
                    return StepResult(error=error)
                reason = first_line(error)
            # Not inside `except`: the error keeps the failed attempt's tensors alive there.
            try:
                work.splitting.shrink(work.objective.rows, reason, work.batches.step + 1)
                work.model.clear_gradient()
                if work.batches.again is not None:
                    work = replace(work, batches=work.batches.again())
            except Exception as error:
                return StepResult(error=error)

    def _compute(self, attempt: StepAttempt) -> None:
        """Run every part forward and backward, in the order of the step. Only the activations of one part are in memory
        at a time."""
        model = attempt.work.model

        def penalty() -> Tensor | None:
            return model.adapter.penalty() if model.adapter else None

        for part in attempt.parts:
            attempt.computing(part)
            with calling(attempt.training_call(part)) as call:
                seed_layer(call, OUTSIDE_LAYERS)
                attempt.backward(part, model.output(part.batch.inputs), penalty)

    def _read_outputs(self, attempt: StepAttempt, read: Read) -> Iterator[Tensor]:
        """Yields the values that `read` computes from the output of each part."""
        for part in attempt.parts:
            attempt.computing(part)
            with calling(attempt.call(part)) as call:
                seed_layer(call, OUTSIDE_LAYERS)
                yield attempt.read(part, attempt.work.model.output(part.batch.inputs), read)


@dataclass(kw_only=True)
class StepView(ModelRun):
    """A run as the objective sees it while it prepares a training step."""

    engine: Engine
    work: StepWork

    def score_step(self, step: StepBatches, read: Read) -> list[Tensor]:
        """The values that `read` computes from each micro-batch in the later forward of the step, as Engine.score."""
        return self.engine.score(replace(self.work, batches=step), read)

    def is_one_part(self, step: StepBatches) -> bool:
        """Whether the step is a single micro-batch on all ranks together, which is not split."""
        return sum(self.gather([len(replace(self.work, batches=step).parts())])) == 1


SHOWN = 4


@contextmanager
def watching_gradients(adapter: AttachedAdapter, reached: set[str]) -> Iterator[None]:
    """A context manager: the kinds of trained tensors that get a gradient in the block are added to `reached`.

    Raises: AdapterError if the loss depends on no trained tensor.
    """
    trained = adapter.trained()
    with ExitStack() as hooks:
        for name, parameter in trained.items():
            note = partial(_note, reached, _kind(name))
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(note))  # type: ignore[no-untyped-call]
        try:
            yield
        except RuntimeError as error:
            if reached or "does not require grad" not in str(error):
                raise
            raise _unreached(list(trained)) from error


def require_gradients(adapter: AttachedAdapter, reached: set[str], devices: Devices) -> None:
    """Check that every trained tensor got a gradient on at least one rank; the gradient may be 0.

    In a layer with experts, one expert with a gradient is enough, because other experts may get no tokens. If the base
    itself is trained, nothing is checked: it may contain tensors that its code never reads.
    Raises: AdapterError with the names of tensors without a gradient.
    """
    everywhere = set(devices.gather(sorted(reached)))
    missing = [name for name in adapter.trained() if _kind(name) not in everywhere]
    if missing:
        raise _unreached(missing)


def _note(reached: set[str], kind: str, parameter: Tensor) -> None:
    reached.add(kind)


def _unreached(names: list[str]) -> AdapterError:
    what = f"no gradient reaches {listed(names, SHOWN)}: the model never uses these adapted modules"
    how = "exclude these modules with adapter.exclude_modules, or adapt other layers"
    return AdapterError(what, how, key="adapter.target_modules")


def _kind(name: str) -> str:
    """The tensor's name without its numbers, except the first number. So the tensors of all experts in a layer have the
    same name: the first number is the layer's, later numbers are the experts'."""
    pieces = name.split(".")
    first = next((place for place, piece in enumerate(pieces) if piece.isdigit()), 0)
    return ".".join(piece for place, piece in enumerate(pieces) if place <= first or not piece.isdigit())
