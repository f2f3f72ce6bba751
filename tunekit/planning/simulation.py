"""Simulates a training step and an evaluation on the meta device, to measure their memory. The simulation uses the
run's real network, engine and optimizer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.method import needs_reference_state
from tunekit.contracts import Batch, Companion, Loss, LossKind, ModelOutput, Objective, StepBatches, Sums
from tunekit.evaluation.scores import prepared, undisturbed
from tunekit.machine.devices import deterministic_kernels, kind_of
from tunekit.memory.slots import waiting_tensor
from tunekit.memory.streaming import host_embedding
from tunekit.model.load import LoadedModel
from tunekit.model.quantized import codec
from tunekit.planning.simulated.kernels import kernels_as_on
from tunekit.planning.simulated.tracker import Simulation, StorageTracker
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings
from tunekit.training.engine import StepWork
from tunekit.training.optimizers import BY_TENSOR, Optimizer, make_optimizer
from tunekit.training.streaming import make_engine
from tunekit.tuned.model import ModelRun, TunedModel
from tunekit.tuned.network import prepare_network

MOMENTS = 2  # moments of AdamW, which torch makes in the first step
SIMULATED = 3  # maximum of simulated micro-batches per pass: from the second on, each adds the same number of bytes
MODEL_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError)  # of the model's code, on the meta device
UNPAGED = {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}  # optimizers with state of the same size


@dataclass(frozen=True)
class SimulatedRun:
    """The values of a run that determine its memory. `base`: on the meta device. `device`: the device that the run is
    planned for."""

    base: LoadedModel
    adapter: AdapterSettings
    objective: Objective
    training: TrainingSection
    execution: ExecutionSettings
    device: torch.device
    companions: Mapping[str, Companion] = field(default_factory=dict)

    def training_step(self, batch: Batch, micro_batches: int = 1) -> Simulation:
        """Simulate the forward, backward and update of one micro-batch, while gradients and optimizer moments are in
        memory.

        `micro_batches`: the number of micro-batches that pass through streamed layers together. At most SIMULATED of
        them are simulated; each further micro-batch adds the same memory as the last simulated one.
        """
        simulation = self._step(batch, min(micro_batches, SIMULATED))
        if micro_batches <= SIMULATED:
            return simulation
        fewer, more = self._step(batch, SIMULATED - 1), micro_batches - SIMULATED
        further = more * (simulation.total - fewer.total)
        activations = simulation.peak.get("activations", 0) + further
        return Simulation(
            simulation.peak | {"activations": activations},
            simulation.total + further,
            simulation.offloaded + more * (simulation.offloaded - fewer.offloaded),
        )

    def _step(self, batch: Batch, micro_batches: int) -> Simulation:
        fixed = deterministic_kernels(self.training.deterministic)
        with torch.random.fork_rng(devices=[]), fixed, self._tracked() as (tuned, tracker, optimizer):
            objective = _logits_apart(self.objective, tuned, tracker)
            units = objective.loss.units(batch)
            step = StepBatches(0, 0.0, tuple(range(micro_batches)), (batch,) * micro_batches)
            step = objective.prepare_step(ModelRun(tuned, objective.rows), step)
            with tuned.training_mode(True):
                work = StepWork(tuned, objective, step, units, self.training.seed, micro_batches_per_pass=micro_batches)
                [result] = make_engine(tuned).run([work])
            result.checked()
            optimizer.gradient_norm()
            with tracker.counting_as("optimizer"):
                tracker.pass_through(optimizer.update_blocks(self.device))
        own = kind_of(self.device).own_memory  # on other devices the tracker has already counted the host's bytes
        return replace(tracker.result(), offloaded=tuned.boundaries.host_bytes if own else 0)

    def needs_more(self, batch: Batch, other: Batch) -> bool:
        """Whether a step with `batch` needs more memory than a step with `other`; False if simulation is impossible."""
        try:
            return self.training_step(batch).total > self.training_step(other).total
        except MODEL_ERRORS:
            return False

    def before_a_step(self) -> dict[str, int]:
        """Bytes that exist before the first step, by part."""
        with self._tracked() as (_, tracker, _):
            return dict(tracker.live)

    def evaluation(self, batch: Batch) -> Simulation:
        """Simulate the forward of one evaluation batch, while the optimizer's state is in memory."""
        held_out = self.objective.evaluation_copy()
        with self._tracked() as (tuned, tracker, _), undisturbed(tuned):
            batch = prepared(tuned, held_out, batch)
            _logits_apart(held_out, tuned, tracker).loss.sums(tuned.output(batch.inputs), batch)
        return tracker.result()

    def rehearsals(self, batch: Batch) -> Simulation | None:
        """Simulate the run's companions (sampling, image generation) while the network and its optimizer are in memory.
        Returns the simulation that needs the most memory.

        None if no companion computes anything.
        """
        simulations = []
        for key in (key for key, companion in self.companions.items() if companion.rehearses):
            with self._tracked() as (tuned, tracker, _):
                companion, run = tuned.companions[key], ModelRun(tuned, self.objective.rows)
                tracker.adopt(companion.present(tuned), "weights")
                tracker.start()
                with undisturbed(tuned):
                    companion.rehearse(run, batch, self.execution, tracker.counting_as)
            simulations.append(tracker.result())
        return max(simulations, key=lambda simulation: simulation.total, default=None)

    @contextmanager
    def _tracked(self) -> Iterator[tuple[TunedModel, StorageTracker, Optimizer]]:
        """A context manager that yields the network, a tracker of the memory allocated inside the block, and the
        optimizer with its state."""
        tuned, tracker = self._tuned(), StorageTracker(self.device)
        with kernels_as_on(self.device), tracker:
            optimizer = self._adopt(tracker, tuned)
            tracker.start()
            yield tuned, tracker, optimizer

    def _tuned(self) -> TunedModel:
        if self.base.facts.quantization == "int8" and codec.has_bitsandbytes():
            codec.import_bitsandbytes()  # imported now, so that the library does not count as growth of the run
        base = replace(self.base, net=deepcopy(self.base.net))
        head = base.family.head_name(base.net)
        attach = partial(attach_adapter, base.net, self.adapter, seed=self.training.seed, head_name=head)
        tuned = prepare_network(base, self.execution, attach, planned_for=self.device)
        tuned.set_router_loss(self.training.router_loss)
        tuned.companions = {key: companion.simulated() for key, companion in self.companions.items()}
        return tuned

    def _adopt(self, tracker: StorageTracker, tuned: TunedModel) -> Optimizer:
        """Count the memory that exists before the step (adapter state, network and optimizer), and return the
        optimizer."""
        assert tuned.adapter is not None
        net, slots = tuned.base.net, tuned.slots
        part = trained_part(tuned.adapter)
        with tracker.counting_as(part):  # if state() detaches a tensor, the tracker sees it first here
            tracker.adopt(tuned.adapter.state().values(), part)
            if needs_reference_state(self.objective, self.adapter):
                tuned.keep_reference()
        resident = slots is None and tuned.streamed_head is None
        on_host = None if resident or self.device.type == "cpu" else host_embedding(tuned.base)
        tables = [] if tuned.streamed_head is None or self.device.type == "cpu" else tuned.streamed_head.tables
        there = {id(tensor) for table in [on_host, *tables] if table is not None for tensor in table.parameters()}
        weights = [tensor for tensor in [*net.parameters(), *net.buffers()] if id(tensor) not in there]
        frozen_parts = tuned.base.family.frozen_parts(net)  # on a GPU only while they run
        for module in frozen_parts if self.device.type == "cpu" or getattr(net, "stays", False) else ():
            weights += [*module.parameters(), *module.buffers()]
        with tracker.counting_as("weights"):
            weights += [tensor for each in tuned.companions.values() for tensor in each.resident(self.device)]
        tracker.adopt(weights, "weights")
        if slots is not None:
            with tracker.counting_as("weights"):
                slots.waiting = waiting_tensor(slots, self.execution.streaming, self.device)
        for each in (slots, None if tuned.streamed_head is None else tuned.streamed_head.slots):
            tracker.adopt([] if each is None else [slot.memory for slot in each.slots], "weights")
        return make_tracked_optimizer(tracker, tuned, self.training)


def trained_part(adapter: AttachedAdapter) -> str:
    """The part of the peak ("weights" or "adapter") that contains trained tensors."""
    return "weights" if adapter.settings.trains_base else "adapter"


def make_tracked_optimizer(tracker: StorageTracker, tuned: TunedModel, training: TrainingSection) -> Optimizer:
    """Make the real optimizer. AdamW's moments are allocated at once, and the optimizer's flat buffers are counted in
    place of the adapter's tensors."""
    assert tuned.adapter is not None
    training = training.model_copy(update={"optimizer": UNPAGED.get(training.optimizer, training.optimizer)})
    with tracker.counting_as("optimizer"):
        optimizer = make_optimizer(training, tuned.adapter, tuned.base.head_modules)
        for flat in optimizer.groups:
            tracker.move([flat.data], trained_part(tuned.adapter))
            if optimizer.name == "adamw":
                flat_moments = [torch.zeros_like(flat.data, requires_grad=False) for _ in range(MOMENTS)]
                optimizer.native.state[flat.data] = {"moments": flat_moments}
        if optimizer.name in BY_TENSOR:
            optimizer.native.step()  # allocates the state
    return optimizer


def _logits_apart(objective: Objective, tuned: TunedModel, tracker: StorageTracker) -> Objective:
    """A copy of the objective whose `loss` and `sums` count the memory that they allocate as logits. For a model
    without text, the objective itself."""
    return objective if tuned.base.text is None else replace(objective, loss=_CountedLoss(objective.loss, tracker))


class _CountedLoss(LossKind):
    """Wraps a loss: memory that the loss allocates counts as logits."""

    def __init__(self, counted: LossKind, tracker: StorageTracker) -> None:
        self.counted, self.tracker = counted, tracker
        self.prepare_step, self.units = counted.prepare_step, counted.units  # type: ignore[method-assign]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        with self.tracker.counting_as("logits"):
            return self.counted.loss(output, batch)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        with self.tracker.counting_as("logits"):
            return self.counted.sums(output, batch)
