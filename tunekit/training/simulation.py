"""A training step and an evaluation without values: the same model, adapter, engine and optimizer on the meta device.

Comes in: the recipe's sections and the longest batches.  Goes out: memory.estimate.Simulation.  Next: plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.memory.checkpointing import prepare_layers
from tunekit.memory.kernels import kernels_as_on
from tunekit.memory.tracker import Simulation, StorageTracker
from tunekit.model.load import LoadedModel, make_meta_model
from tunekit.objectives.base import make_objective
from tunekit.protocols import Batch, Head, Loss, Objective, Window
from tunekit.recipe.model import ModelSection
from tunekit.recipe.section import AdapterSettings, ObjectiveSettings
from tunekit.recipe.training import TrainingSection
from tunekit.training.evaluation import undisturbed
from tunekit.training.optimizers import Group, Optimizer
from tunekit.training.resident import ResidentEngine
from tunekit.training.tuned import TunedModel

MOMENTS = 2  # AdamW's, which torch makes in its first step
UNPAGED = {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}  # state of the same size


@dataclass(frozen=True)
class SimulatedRun:
    """What decides a run's memory; `device` is the one it is planned for."""

    model: ModelSection
    adapter: AdapterSettings
    objective: ObjectiveSettings
    training: TrainingSection
    logits_chunk_tokens: int
    device: torch.device
    _made: dict[ModelSection, LoadedModel] = field(default_factory=dict, repr=False, compare=False)

    def training_step(self, batch: Batch, checkpointed_layers: int) -> Simulation:
        """Forward, backward and update of one micro-batch, the second of its step: gradients and moments exist."""
        tuned, tracker = self._tuned(checkpointed_layers), StorageTracker(self.device)
        assert tuned.adapter is not None
        objective = _LogitsApart(self._objective(), tracker)
        with torch.random.fork_rng(devices=[]), kernels_as_on(self.device), tracker:
            self._adopt(tracker, tuned)
            optimizer = make_tracked_optimizer(tracker, tuned.adapter, self.training)
            tracker.start()
            units = objective.units(batch)
            with tuned.training_mode(True):
                ResidentEngine(self.training.seed).run_window(tuned, objective, Window(0, 0.0, (0,), (batch,)), units)
            optimizer.gradient_norm()
            with tracker.counting_as("optimizer"):
                tracker.pass_through(optimizer.update_blocks(self.device))
        return tracker.result()

    def needs_more(self, batch: Batch, other: Batch) -> bool:
        """Whether a step of one batch needs more memory than one of another; False where neither can be simulated."""
        try:
            return self.training_step(batch, 0).total > self.training_step(other, 0).total
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # the model's own code
            return False

    def before_a_step(self) -> dict[str, int]:
        """Bytes by part of what exists before the first step."""
        tuned, tracker = self._tuned(0), StorageTracker(self.device)
        assert tuned.adapter is not None
        with tracker:
            self._adopt(tracker, tuned)
            optimizer = make_tracked_optimizer(tracker, tuned.adapter, self.training)
            live = dict(tracker.live)
        del optimizer
        return live

    def evaluation(self, batch: Batch) -> Simulation:
        """The forward of one evaluation batch, with the optimizer's state beside it."""
        tuned, tracker = self._tuned(0), StorageTracker(self.device)
        assert tuned.adapter is not None
        objective = _LogitsApart(self._objective(), tracker)
        with kernels_as_on(self.device), tracker:
            self._adopt(tracker, tuned)
            optimizer = make_tracked_optimizer(tracker, tuned.adapter, self.training)
            tracker.start()
            with undisturbed(tuned):
                objective.loss(tuned.hidden(objective.inputs(batch)), tuned.head(), batch)
        del optimizer
        return tracker.result()

    def _base(self) -> LoadedModel:
        """The model without weights and without adapter: made once (a GGUF file takes seconds to read), then copied."""
        if self.model not in self._made:
            self._made[self.model] = make_meta_model(self.model, device=self.device)
        base = self._made[self.model]
        return replace(base, net=deepcopy(base.net))

    def _tuned(self, checkpointed_layers: int) -> TunedModel:
        base = self._base()
        head = base.family.head_name(base.net)
        adapter = attach_adapter(base.net, self.adapter, seed=self.training.seed, head_name=head)
        prepare_layers([layer for _, layer in base.family.layers(base.net)], checkpointed_layers)
        return TunedModel(replace(base, device=torch.device("meta")), adapter)

    def _objective(self) -> Objective:
        return make_objective(self.objective, logits_chunk_tokens=self.logits_chunk_tokens)

    @staticmethod
    def _adopt(tracker: StorageTracker, tuned: TunedModel) -> None:
        """Count what exists before the step: the adapter's state, then everything else of the network."""
        assert tuned.adapter is not None
        net = tuned.base.net
        with tracker.counting_as("adapter"):  # where state() detaches a tensor, that alone brings it to notice
            tracker.adopt(tuned.adapter.state().values(), "adapter")
        tracker.adopt([*net.parameters(), *net.buffers()], "weights")


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
    """An objective whose `loss` is counted as logits."""

    def __init__(self, objective: Objective, tracker: StorageTracker) -> None:
        self._objective, self._tracker = objective, tracker
        self.family, self.packable = objective.family, objective.packable
        self.needs_reference = objective.needs_reference

    def prepare(self, model: object, window: Window) -> Window:
        return self._objective.prepare(model, window)

    def units(self, batch: Batch) -> Tensor:
        return self._objective.units(batch)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return self._objective.inputs(batch)

    def loss(self, output: Tensor, head: Head, batch: Batch, head_parameters: Sequence[Tensor] = ()) -> Loss:
        with self._tracker.counting_as("logits"):
            return self._objective.loss(output, head, batch, head_parameters)
