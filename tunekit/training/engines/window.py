"""The engine for a base whose weights are all on the device: forward and backward of one micro-batch at a time.

It adds the gradient of (sum of losses / units) to the flat gradient buffers. A micro-batch that runs out of memory is
split (memory/splitting.py), which changes only the order of sums. streaming.py has the engine for layers that are not
on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tunekit.contracts import Batch, Engine, ModelOutput, Objective, Read, Sums, Window
from tunekit.machine.placing import to_device
from tunekit.memory.splitting import PIECE_STRIDE, Splitting
from tunekit.model.call import AFTER_LAYERS, OUTSIDE_LAYERS, Call, calling, current_call, seed_layer
from tunekit.tuned.model import TunedModel

WindowResult = tuple[Tensor, Sums]  # the sum of losses / units, (K,) float64, and the sums of logged values


@dataclass(frozen=True, eq=False)
class WindowRequest:
    """A request of a training loop to its caller: run this window (the micro-batches of one optimizer step).
    `micro_batches`: the number of micro-batches in the step, over all ranks."""

    engine: Engine
    model: TunedModel
    objective: Objective
    window: Window
    units: Tensor
    micro_batches: int

    def run(self) -> WindowResult:
        """Run the window alone."""
        return self.engine.run_window(self.model, self.objective, self.window, self.units, self.micro_batches)


LoopSteps = Generator[WindowRequest, WindowResult, None]  # a training loop that asks for its windows to be run


def run_alone(steps: LoopSteps) -> None:
    """Run a training loop to its end. Each window that the loop requests is run at once, alone."""
    request = next(steps, None)
    while request is not None:
        request = answer(steps, request.run)


def answer(steps: LoopSteps, run: Callable[[], WindowResult]) -> WindowRequest | None:
    """Call `run`, and send its result or its error to the training loop. Returns the loop's next request; None if the
    loop has ended."""
    try:
        result = run()
    except BaseException as error:
        send = partial(steps.throw, error)
    else:
        send = partial(steps.send, result)
    try:
        return send()
    except StopIteration:
        return None


@dataclass(frozen=True)
class Piece:
    """A micro-batch, or a part of a split micro-batch. `index`: the micro-batch's index in the step. `number`: the
    part's index in the micro-batch."""

    batch: Batch
    index: int
    number: int
    shares: int  # divisor of per-step terms: the step's micro-batches times the parts of this one


def pieces_of(window: Window, parts: Sequence[Sequence[Batch]], micro_batches: int) -> list[Piece]:
    """A Piece for each part of each micro-batch of a window. `parts`: the parts of each micro-batch. `micro_batches`:
    the number of micro-batches in the step, over all ranks."""
    return [
        Piece(batch, index, number, micro_batches * len(batches))
        for index, batches in zip(window.indices, parts, strict=True)
        for number, batch in enumerate(batches)
    ]


class WindowRun:
    """One attempt to run a window (the micro-batches of one optimizer step): values that all micro-batches share, and
    the sums of their losses and metrics."""

    def __init__(
        self, engine: WindowEngine, model: TunedModel, objective: Objective, window: Window, units: Tensor
    ) -> None:
        self.engine, self.model, self.objective, self.step = engine, model, objective, window.step
        self.units = to_device(units, model.device)
        self.losses = {index: torch.zeros_like(self.units) for index in window.indices}  # (K,) each
        self.metrics: Sums = {}
        self.weight = 1.0  # weight of every loss; 0 for forwards that only keep ranks in step

    def call(self, piece: Piece) -> Call:
        """The settings (Call) of a micro-batch's forward. Each part of a split micro-batch gets different random
        numbers."""
        micro_batch = piece.index + piece.number * PIECE_STRIDE
        return Call(step=self.step, micro_batch=micro_batch, seed=self.engine.seed, seeded=True)

    def results(self) -> tuple[Tensor, Sums]:
        """The sum of losses / units, (K,) float64, and the sums of logged values."""
        self.engine.losses = list(self.losses.values())
        total = torch.zeros_like(self.units)
        for losses in self.engine.losses:
            total += losses / self.units
        return total, self.metrics

    def computing(self, piece: Piece) -> None:
        """Remember which micro-batch is running. If memory runs out, this one is split."""
        if self.engine.splitting is not None:
            self.engine.splitting.running = piece.batch

    def read(self, piece: Piece, output: ModelOutput, read: Read) -> Tensor:
        """The values that `read` computes from a piece's output, with the seed that the piece's loss will have."""
        seed_layer(current_call(), AFTER_LAYERS)
        return read(output, piece.batch)

    def backward(self, piece: Piece, output: ModelOutput, penalty: Callable[[], Tensor | None]) -> None:
        """Add a micro-batch's loss to the sums, and run its backward pass."""
        seed_layer(current_call(), AFTER_LAYERS)
        loss = self.objective.loss.loss(output, piece.batch)
        del output
        value = (loss.total / self.units.to(loss.total.dtype)).sum()
        if (term := penalty()) is not None:
            value = value + term / piece.shares
        (value * self.engine.loss_scale * self.weight).backward()  # type: ignore[no-untyped-call]
        self.losses[piece.index] += loss.total.detach().to(self.units.dtype)
        for name, metric in loss.metrics.items():
            self.metrics[name] = self.metrics[name] + metric if name in self.metrics else metric


class WindowEngine:
    """Runs the micro-batches of a window one by one. If memory runs out, it splits the micro-batch and starts the
    window again.

    `splitting`: how micro-batches are split; None: an error is raised instead.
    """

    def __init__(self, seed: int, splitting: Splitting | None = None) -> None:
        self.seed, self.splitting = seed, splitting
        self.loss_scale = 1.0  # for float16; multiplies the loss before the backward pass
        # the loss of each micro-batch of the last window, on the device; locates the rows of a NaN
        self.losses: list[Tensor] = []

    def run_window(
        self, model: TunedModel, objective: Objective, window: Window, units: Tensor, micro_batches: int = 1
    ) -> tuple[Tensor, Sums]:
        """Run the window. Returns this rank's sum of losses / units, (K,) float64, and the sums of logged values, on
        the device.

        The gradient must be zero before the call, because a failed attempt sets it to zero.
        `micro_batches`: the step's number of micro-batches over all ranks; loss terms per step are averaged over them.
        Raises: ResourceError if a single document does not fit into memory (only with `splitting`).
        """

        def attempt(parts: list[list[Batch]]) -> tuple[Tensor, Sums]:
            run = WindowRun(self, model, objective, window, units)
            with model.unchanged_weights(), model.clearing_on_failure():
                self._run(run, pieces_of(window, parts, micro_batches))
            return run.results()

        if self.splitting is None:
            return attempt([[batch] for batch in window.batches])
        return self.splitting.run(objective.rows, window.batches, attempt, model.clear_gradient, window.step + 1)

    def score(self, model: TunedModel, objective: Objective, window: Window, read: Read) -> list[Tensor]:
        """The values that `read` computes from each micro-batch's output, on the device and without gradient. They are
        the values that `run_window` computes later from the same batches, because parts, modes and seeds are the same.

        `read` returns one value for each row or token, so that the values of the parts of a micro-batch follow each
        other. If memory runs out, the micro-batch is split, here and in `run_window`.
        Raises: ResourceError if a single document does not fit into memory (only with `splitting`).
        """

        def attempt(parts: list[list[Batch]]) -> list[Tensor]:
            run = WindowRun(self, model, objective, window, torch.ones(1, dtype=torch.float64))
            with torch.no_grad(), model.training_mode(True), model.unchanged_weights(), model.clearing_on_failure():
                values = iter(list(self._read_outputs(run, pieces_of(window, parts, 1), read)))
            return [torch.cat([next(values) for _ in pieces]) for pieces in parts]

        if self.splitting is None:
            return attempt([[batch] for batch in window.batches])
        return self.splitting.run(objective.rows, window.batches, attempt, model.clear_gradient, window.step + 1)

    def _read_outputs(self, run: WindowRun, pieces: Sequence[Piece], read: Read) -> Iterator[Tensor]:
        """Yields the values that `read` computes from the output of each piece."""
        for piece in pieces:
            run.computing(piece)
            with calling(run.call(piece)) as call:
                seed_layer(call, OUTSIDE_LAYERS)
                yield run.read(piece, run.model.output(piece.batch.inputs), read)

    def make_up(self, model: TunedModel, objective: Objective, batch: Batch, forwards: int) -> None:
        """Run forward and backward of a batch `forwards` times with loss weight 0. Gradients do not change. Used on
        ranks that have fewer micro-batches than other ranks."""
        window = Window(0, 0.0, tuple(range(forwards)), (batch,) * forwards)
        run = WindowRun(self, model, objective, window, objective.loss.units(batch))
        run.weight = 0.0
        with model.unchanged_weights(), model.clearing_on_failure():
            self._run(run, [Piece(batch, index, 0, forwards) for index in window.indices])

    def _run(self, run: WindowRun, pieces: Sequence[Piece]) -> None:
        """Run every piece forward and backward, in the order of the step. Only the activations of one piece are in
        memory at a time."""
        model = run.model

        def penalty() -> Tensor | None:
            return model.adapter.penalty() if model.adapter else None

        for piece in pieces:
            run.computing(piece)
            with calling(run.call(piece)) as call:
                seed_layer(call, OUTSIDE_LAYERS)
                run.backward(piece, model.output(piece.batch.inputs), penalty)
