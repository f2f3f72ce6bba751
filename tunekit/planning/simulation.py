"""A training step and an evaluation without values: the same model, adapter, engine and optimizer on the meta device.

Comes in: the recipe's sections and the longest batches.  Goes out: Simulations.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.contracts import Batch, Loss, ModelOutput, Objective, Sums, Window
from tunekit.memory.blobs import frozen_tensors
from tunekit.memory.checkpointing import prepare_layers
from tunekit.memory.offload import make_store
from tunekit.memory.slots import LayerSlots
from tunekit.memory.streaming import host_embedding, make_slots, stream_layers
from tunekit.memory.tiling import tile_layers
from tunekit.model.load import LoadedModel, make_meta_model
from tunekit.model.quantized import codec
from tunekit.planning.simulated.kernels import kernels_as_on
from tunekit.planning.simulated.tracker import Simulation, StorageTracker
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.section import AdapterSettings
from tunekit.recipe.training import TrainingSection
from tunekit.training.engines.choice import make_engine
from tunekit.training.optimizers import Group, Optimizer
from tunekit.tuned.model import TunedModel
from tunekit.tuned.scores import undisturbed

MOMENTS = 2  # AdamW's, which torch makes in its first step
UNPAGED = {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}  # state of the same size


@dataclass(frozen=True)
class SimulatedRun:
    """What decides a run's memory; `device` is the one it is planned for."""

    model: ModelSection
    adapter: AdapterSettings
    objective: Objective
    training: TrainingSection
    logits_chunk_tokens: int
    device: torch.device
    memory: MemorySection = field(default_factory=MemorySection)
    streaming: str = "off"
    bases: dict[ModelSection, LoadedModel] = field(default_factory=dict, repr=False, compare=False)  # made already

    def training_step(self, batch: Batch, checkpointed_layers: int, micro_batches: int = 1) -> Simulation:
        """Forward, backward and update of one micro-batch, the second of its step: gradients and moments exist.

        `micro_batches`: how many of this size pass through the layers together, where weights are streamed.
        """
        (tuned, slots), tracker = self._tuned(checkpointed_layers), StorageTracker(self.device)
        assert tuned.adapter is not None
        objective = _LogitsApart(self.objective, tracker)
        engine = make_engine(self.training.seed, slots, micro_batches)
        with torch.random.fork_rng(devices=[]), kernels_as_on(self.device), tracker:
            self._adopt(tracker, tuned, slots)
            optimizer = make_tracked_optimizer(tracker, tuned.adapter, self.training)
            tracker.start()
            units = objective.units(batch)
            window = Window(0, 0.0, tuple(range(micro_batches)), (batch,) * micro_batches)
            with tuned.training_mode(True):
                engine.run_window(tuned, objective, window, units)
            optimizer.gradient_norm()
            with tracker.counting_as("optimizer"):
                tracker.pass_through(optimizer.update_blocks(self.device))
        assert tuned.boundaries is not None
        pinned = tuned.boundaries.host_bytes if self.device.type == "cuda" else 0  # on a CPU they are counted already
        return replace(tracker.result(), offloaded=pinned)

    def needs_more(self, batch: Batch, other: Batch) -> bool:
        """Whether a step of one batch needs more memory than one of another; False where neither can be simulated."""
        try:
            return self.training_step(batch, 0).total > self.training_step(other, 0).total
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # the model's own code
            return False

    def before_a_step(self) -> dict[str, int]:
        """Bytes by part of what exists before the first step."""
        (tuned, slots), tracker = self._tuned(0), StorageTracker(self.device)
        assert tuned.adapter is not None
        with tracker:
            self._adopt(tracker, tuned, slots)
            optimizer = make_tracked_optimizer(tracker, tuned.adapter, self.training)
            live = dict(tracker.live)
        del optimizer
        return live

    def evaluation(self, batch: Batch) -> Simulation:
        """The forward of one evaluation batch, with the optimizer's state beside it."""
        (tuned, slots), tracker = self._tuned(0), StorageTracker(self.device)
        assert tuned.adapter is not None
        objective = _LogitsApart(self.objective, tracker)
        with kernels_as_on(self.device), tracker:
            self._adopt(tracker, tuned, slots)
            optimizer = make_tracked_optimizer(tracker, tuned.adapter, self.training)
            tracker.start()
            with undisturbed(tuned):
                objective.sums(tuned.output(batch.inputs), batch)
        del optimizer
        return tracker.result()

    def _base(self) -> LoadedModel:
        """The model without weights and without adapter: made once (a GGUF file takes seconds to read), then copied."""
        if self.model.quantization == "int8" and codec.has_bitsandbytes():
            codec.import_bitsandbytes()  # the run's products do, and what a library takes is no part of a run's growth
        if self.model not in self.bases:
            self.bases[self.model] = make_meta_model(self.model, device=self.device)
        base = self.bases[self.model]
        return replace(base, net=deepcopy(base.net))

    def _tuned(self, checkpointed_layers: int) -> tuple[TunedModel, LayerSlots | None]:
        base = self._base()
        weights = [frozen_tensors(layer) for _, layer in base.family.layers(base.net)]
        head = base.family.head_name(base.net)
        adapter = attach_adapter(base.net, self.adapter, seed=self.training.seed, head_name=head)
        store = make_store(self.memory.activation_offload, self.device, simulated=True)
        layers = base.family.layers(base.net)
        prepare_layers([layer for _, layer in layers], checkpointed_layers, store)
        if self.memory.mlp_tile_tokens is not None:
            hidden = torch.empty(0, base.facts.hidden_size, dtype=base.dtype, device="meta")
            tile_layers(layers, self.memory.mlp_tile_tokens, hidden)
        slots = None
        if self.streaming != "off":
            slots = make_slots(weights, torch.device("meta"), tier="disk")  # what waits on the host: see _waiting_bytes
            stream_layers([layer for _, layer in layers], slots)
        on_meta = replace(base, device=torch.device("meta"))
        return TunedModel(on_meta, adapter, store, self.logits_chunk_tokens), slots

    def _adopt(self, tracker: StorageTracker, tuned: TunedModel, slots: LayerSlots | None) -> None:
        """Count what exists before the step: the adapter's state, then everything else of the network."""
        assert tuned.adapter is not None
        net = tuned.base.net
        with tracker.counting_as("adapter"):  # where state() detaches a tensor, that alone brings it to notice
            tracker.adopt(tuned.adapter.state().values(), "adapter")
        on_host = None if slots is None or self.device.type == "cpu" else host_embedding(tuned.base)
        there = set() if on_host is None else {id(tensor) for tensor in on_host.parameters()}
        weights = [tensor for tensor in [*net.parameters(), *net.buffers()] if id(tensor) not in there]
        tracker.adopt(weights, "weights")
        if slots is not None:
            waiting = slots.waiting = torch.empty(self._waiting_bytes(slots), dtype=torch.uint8, device="meta")
            tracker.adopt([*(slot.memory for slot in slots.slots), waiting], "weights")

    def _waiting_bytes(self, slots: LayerSlots) -> int:
        """What layers outside of slots take of a CPU's memory: all of it, or of mapped files the one tensor that is
        being copied."""
        if self.device.type != "cpu":
            return 0
        if self.streaming == "host":
            return sum(blob.size_bytes for blob in slots.blobs)
        return max(piece.size_bytes for blob in slots.blobs for piece in blob.pieces)


def make_tracked_optimizer(tracker: StorageTracker, adapter: AttachedAdapter, training: TrainingSection) -> Optimizer:
    """The real optimizer, whose flat buffers replace the adapter's own tensors; AdamW's moments made at once."""
    groups = [Group(tuple(names), rate, decays) for names, rate, decays in adapter.groups(training)]
    training = training.model_copy(update={"optimizer": UNPAGED.get(training.optimizer, training.optimizer)})
    with tracker.counting_as("optimizer"):
        optimizer = Optimizer(training, groups, adapter.trained())
        for flat in optimizer.groups:
            tracker.move([flat.data], "adapter")
            if optimizer.gated:
                flat_moments = [torch.zeros_like(flat.data, requires_grad=False) for _ in range(MOMENTS)]
                optimizer.native.state[flat.data] = {"moments": flat_moments}
    return optimizer


class _LogitsApart:
    """An objective whose `loss` and `sums` are counted as logits."""

    def __init__(self, objective: Objective, tracker: StorageTracker) -> None:
        self._objective, self._tracker = objective, tracker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        with self._tracker.counting_as("logits"):
            return self._objective.loss(output, batch)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        with self._tracker.counting_as("logits"):
            return self._objective.sums(output, batch)
