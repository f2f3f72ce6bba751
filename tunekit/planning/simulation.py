"""A training step and an evaluation without values: what the run's own network, engine and optimizer would keep."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.method import needs_reference_state
from tunekit.contracts import Batch, Companion, Loss, LossKind, ModelOutput, Objective, Sums, Window
from tunekit.evaluation.scores import prepared, undisturbed
from tunekit.machine.devices import deterministic_kernels, kind_of
from tunekit.memory.slots import waiting_tensor
from tunekit.memory.streaming import host_embedding
from tunekit.model.load import LoadedModel, make_meta_model
from tunekit.model.quantized import codec
from tunekit.planning.simulated.kernels import kernels_as_on
from tunekit.planning.simulated.tracker import Simulation, StorageTracker
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection
from tunekit.records import Choice
from tunekit.training.engines.streaming import make_engine
from tunekit.training.optimizers import Optimizer, make_optimizer
from tunekit.tuned.model import ModelRun, TunedModel
from tunekit.tuned.network import prepare_network

MOMENTS = 2  # AdamW's, which torch makes in its first step
SIMULATED = 3  # micro-batches of a pass: from the second on, each adds as many bytes as the one before
UNPAGED = {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}  # state of the same size


@dataclass(frozen=True)
class SimulatedRun:
    """What decides a run's memory; `device` is the one it is planned for."""

    model: ModelSection
    adapter: AdapterSettings
    objective: Objective
    training: TrainingSection
    choice: Choice
    device: torch.device
    memory: MemorySection = field(default_factory=MemorySection)
    companions: Mapping[str, Companion] = field(default_factory=dict)
    bases: dict[ModelSection, LoadedModel] = field(default_factory=dict, repr=False, compare=False)  # made already

    def training_step(self, batch: Batch, micro_batches: int = 1) -> Simulation:
        """Forward, backward and update of one micro-batch, the second of its step: gradients and moments exist.

        `micro_batches`: how many of this size pass through the layers together, where weights are streamed. If they are
        more than SIMULATED, the difference between the last two simulated ones is added for each further one.
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
            engine = make_engine(self.training.seed, tuned.slots, micro_batches)
            units = objective.loss.units(batch)
            window = Window(0, 0.0, tuple(range(micro_batches)), (batch,) * micro_batches)
            window = objective.prepare(ModelRun(tuned, objective.rows), window)
            with tuned.training_mode(True):
                engine.run_window(tuned, objective, window, units)
            optimizer.gradient_norm()
            with tracker.counting_as("optimizer"):
                tracker.pass_through(optimizer.update_blocks(self.device))
        own = kind_of(self.device).own_memory  # else the bytes on the host are counted already
        return replace(tracker.result(), offloaded=tuned.boundaries.host_bytes if own else 0)

    def needs_more(self, batch: Batch, other: Batch) -> bool:
        """Whether a step of one batch needs more memory than one of another; False where neither can be simulated."""
        try:
            return self.training_step(batch).total > self.training_step(other).total
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # the model's own code
            return False

    def before_a_step(self) -> dict[str, int]:
        """Bytes by part of what exists before the first step."""
        with self._tracked() as (_, tracker, _):
            return dict(tracker.live)

    def evaluation(self, batch: Batch) -> Simulation:
        """The forward of one evaluation batch, with the optimizer's state beside it."""
        held_out = self.objective.evaluation_copy()
        with self._tracked() as (tuned, tracker, _), undisturbed(tuned):
            batch = prepared(tuned, held_out, batch)
            _logits_apart(held_out, tuned, tracker).loss.sums(tuned.output(batch.inputs), batch)
        return tracker.result()

    def rehearsals(self, batch: Batch) -> Simulation | None:
        """The companion that needs most while it acts, beside the net and its optimizer; None if none acts."""
        simulations = []
        for key in (key for key, companion in self.companions.items() if companion.rehearses):
            with self._tracked() as (tuned, tracker, _):
                companion = tuned.companions[key]
                tracker.adopt(companion.present(tuned), "weights")
                tracker.start()
                with undisturbed(tuned):
                    companion.rehearse(ModelRun(tuned, self.objective.rows), batch, tracker.counting_as)
            simulations.append(tracker.result())
        return max(simulations, key=lambda simulation: simulation.total, default=None)

    @contextmanager
    def _tracked(self) -> Iterator[tuple[TunedModel, StorageTracker, Optimizer]]:
        """The network, what counts its memory from then on, and the optimizer, whose state exists for that long."""
        tuned, tracker = self._tuned(), StorageTracker(self.device)
        with kernels_as_on(self.device), tracker:
            optimizer = self._adopt(tracker, tuned)
            tracker.start()
            yield tuned, tracker, optimizer

    def _base(self) -> LoadedModel:
        """The model without weights and without adapter: made once (a GGUF file takes seconds to read), then copied."""
        if self.model.quantization == "int8" and codec.has_bitsandbytes():
            codec.import_bitsandbytes()  # the run's products do, and what a library takes is no part of a run's growth
        if self.model not in self.bases:
            self.bases[self.model] = make_meta_model(self.model, device=self.device)
        base = self.bases[self.model]
        return replace(base, net=deepcopy(base.net))

    def _tuned(self) -> TunedModel:
        base = self._base()
        head = base.family.head_name(base.net)
        attach = partial(attach_adapter, base.net, self.adapter, seed=self.training.seed, head_name=head)
        tuned = prepare_network(base, self.choice, attach, planned_for=self.device)
        tuned.companions = {key: companion.simulated() for key, companion in self.companions.items()}
        return tuned

    def _adopt(self, tracker: StorageTracker, tuned: TunedModel) -> Optimizer:
        """Count what exists before the step: the adapter's state, everything else of the network, the optimizer."""
        assert tuned.adapter is not None
        net, slots = tuned.base.net, tuned.slots
        part = trained_part(tuned.adapter)
        with tracker.counting_as(part):  # where state() detaches a tensor, that alone brings it to notice
            tracker.adopt(tuned.adapter.state().values(), part)
            if needs_reference_state(self.objective, self.adapter):
                tuned.keep_reference()
        resident = slots is None and tuned.head_parts is None
        on_host = None if resident or self.device.type == "cpu" else host_embedding(tuned.base)
        tables = [] if tuned.head_parts is None or self.device.type == "cpu" else tuned.head_parts.tables
        there = {id(tensor) for table in [on_host, *tables] if table is not None for tensor in table.parameters()}
        weights = [tensor for tensor in [*net.parameters(), *net.buffers()] if id(tensor) not in there]
        frozen_parts = tuned.base.family.frozen_parts(net)  # on a GPU only while they are needed
        for module in frozen_parts if self.device.type == "cpu" or getattr(net, "stays", False) else ():
            weights += [*module.parameters(), *module.buffers()]
        with tracker.counting_as("weights"):
            weights += [tensor for each in tuned.companions.values() for tensor in each.resident(self.device)]
        tracker.adopt(weights, "weights")
        if slots is not None:
            with tracker.counting_as("weights"):
                slots.waiting = waiting_tensor(slots, self.choice.streaming, self.device)
        for each in (slots, None if tuned.head_parts is None else tuned.head_parts.slots):
            tracker.adopt([] if each is None else [slot.memory for slot in each.slots], "weights")
        return make_tracked_optimizer(tracker, tuned.adapter, self.training)


def trained_part(adapter: AttachedAdapter) -> str:
    """As which part of the peak the trained tensors count."""
    return "weights" if adapter.settings.trains_base else "adapter"


def make_tracked_optimizer(tracker: StorageTracker, adapter: AttachedAdapter, training: TrainingSection) -> Optimizer:
    """The real optimizer, whose flat buffers replace the adapter's own tensors; AdamW's moments made at once."""
    training = training.model_copy(update={"optimizer": UNPAGED.get(training.optimizer, training.optimizer)})
    with tracker.counting_as("optimizer"):
        optimizer = make_optimizer(training, adapter)
        for flat in optimizer.groups:
            tracker.move([flat.data], trained_part(adapter))
            if optimizer.name == "adamw":
                flat_moments = [torch.zeros_like(flat.data, requires_grad=False) for _ in range(MOMENTS)]
                optimizer.native.state[flat.data] = {"moments": flat_moments}
    return optimizer


def _logits_apart(objective: Objective, tuned: TunedModel, tracker: StorageTracker) -> Objective:
    """For a model of text, the objective whose `loss` and `sums` are counted as logits; other models have none."""
    return objective if tuned.base.text is None else replace(objective, loss=_CountedLoss(objective.loss, tracker))


class _CountedLoss(LossKind):
    """A loss that is counted as logits."""

    def __init__(self, counted: LossKind, tracker: StorageTracker) -> None:
        self.counted, self.tracker = counted, tracker
        self.prepare, self.units = counted.prepare, counted.units  # type: ignore[method-assign]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        with self.tracker.counting_as("logits"):
            return self.counted.loss(output, batch)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        with self.tracker.counting_as("logits"):
            return self.counted.sums(output, batch)
