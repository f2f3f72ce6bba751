"""A small training run put together by hand, for tests of the loop that need no recipe and no run folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support.data_case import objective_of, sequence_row
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.console import Console
from tunekit.contracts import Row, StepBatches
from tunekit.data.batching.steps import BatchSettings, StoredSteps
from tunekit.errors import Stopped
from tunekit.evaluation.evaluator import Evaluation
from tunekit.machine.devices import make_devices
from tunekit.machine.signals import StopSignals
from tunekit.memory.blobs import frozen_tensors
from tunekit.memory.offload import BoundaryStore, prepare_layers
from tunekit.memory.streaming import make_slots, shared_slots, stream_layers
from tunekit.model.load import LoadedModel, load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.data import DataSection
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.output import OutputSection
from tunekit.recipe.recipe import Recipe
from tunekit.recipe.training import TrainingSection
from tunekit.records import DEFAULT_SHOWS, EvaluationRecord, StepRecord
from tunekit.training.engine import StepResult, StepWork
from tunekit.training.optimizers import Optimizer, make_optimizer
from tunekit.training.run import Run
from tunekit.training.schedules import warmup_steps
from tunekit.training.session import Session
from tunekit.training.state import LoopState, LossScale, checkpoint_facts, checkpoint_tensors, restore
from tunekit.tuned.model import TunedModel

# how a model is given kept keys and values, and gives them back, in this release of transformers
KEPT = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("TUNEKIT_TEST_DEVICE", "cpu"))  # where a case is computed that names no other


class ListedRows:
    """Rows over a list."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [replace(row, number=number) for number, row in enumerate(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def sizes(self) -> Any:
        return np.array([row.sizes for row in self.rows], dtype=np.int64)

    @property
    def lengths(self) -> Any:
        return self.sizes.sum(axis=1)

    @property
    def supervised(self) -> Any:
        return np.array([row.supervised for row in self.rows], dtype=np.int64)


def make_rows(count: int, *, vocabulary: int = 256, shortest: int = 2, longest: int = 31, seed: int = 0) -> ListedRows:
    """Random rows of shortest..longest tokens; the first half of each is a prompt, the last token always a target."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = shortest + number % (longest - shortest + 1)
        ids = generator.integers(3, vocabulary, length).astype(np.int32)
        trained = np.arange(length) >= length // 2
        trained[-1] = True
        rows.append(sequence_row(ids, trained, f"rows:{number + 1}"))
    return ListedRows(rows)


@dataclass
class Case:
    """What a test looks at after (or between) steps."""

    model: TunedModel
    adapter: AttachedAdapter
    steps: StoredSteps
    optimizer: Optimizer
    training: TrainingSection
    parts: Run
    records: list[StepRecord | EvaluationRecord] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)

    def run(self, state: LoopState | None = None) -> LoopState:
        self.parts.state = state or LoopState(self.parts.state.scale)
        self.parts.train()
        return self.parts.state

    def work(self, step: StepBatches, units: Tensor | None = None, **changes: Any) -> StepWork:
        """A step of the run. Without `units`: those of the step."""
        zero = torch.zeros(1, dtype=torch.float64)
        units = sum(map(self.parts.objective.loss.units, step.batches), zero) if units is None else units
        return replace(self.parts._work(step), units=units, **changes)

    def step(self, step: StepBatches, units: Tensor | None = None, **changes: Any) -> StepResult:
        """Run the forward and backward of one step."""
        [result] = self.parts.engine.run([self.work(step, units, **changes)])
        return result.checked()

    def evaluate_with(self, evaluate: Callable[[], Evaluation]) -> None:
        """Let the run call this function in place of an evaluation."""
        self.parts.evaluator = object()  # type: ignore[assignment]
        self.parts.evaluate = lambda evaluator: evaluate()  # type: ignore[method-assign]

    def around_steps(self, around: Callable[[Callable[[], StepResult], StepWork], StepResult]) -> None:
        """Let `around` run each step of this run: it gets a function that runs it, and the step."""
        run = self.parts.engine.run

        def replaced(works: Sequence[StepWork]) -> list[StepResult]:
            return [around(lambda work=work: run([work])[0], work) for work in works]  # type: ignore[misc]

        self.parts.engine.run = replaced  # type: ignore[method-assign]

    def watch_steps(self, enter: Callable[[int], None], leave: Callable[[], None]) -> None:
        """Call `enter` with the number of finished steps, and `leave`, around everything that a step does, but for the
        reading of numbers of an earlier step."""
        run, plain = self.parts, self.parts.settle

        def inside(work: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*values: Any) -> Any:
                enter(run.state.step)
                try:
                    return work(*values)
                finally:
                    leave()

            return watched

        def settle() -> None:
            leave()
            plain()
            enter(run.state.step)

        def finish(*values: Any) -> None:
            run.settle = settle  # type: ignore[method-assign]
            try:
                finish_step(*values)
            finally:
                run.settle = plain  # type: ignore[method-assign]

        finish_step = run.finish_step
        run.begin_step, run.finish_step = inside(run.begin_step), inside(finish)  # type: ignore[method-assign]
        run.engine.run = inside(run.engine.run)  # type: ignore[method-assign]

    def run_after_a_stop(self, stopped: Case, steps: int) -> None:
        """Stop `stopped` by a signal after so many steps, and go on here from what a checkpoint holds of it."""
        stopped.parts.session.stop_signal = lambda step: 15 if len(stopped.losses) >= steps else 0  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            stopped.run()
        tensors = {
            name: value.clone() for name, value in checkpoint_tensors(stopped.optimizer, stopped.adapter).items()
        }
        facts = checkpoint_facts(stopped.optimizer, stopped.parts.state, {})
        self.run(restore(tensors, facts, self.optimizer, self.adapter))

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records if isinstance(record, StepRecord)]

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors."""
        return {name: tensor.clone() for name, tensor in self.adapter.state().items()}


def make_case(
    folder: Path,
    rows: ListedRows,
    *,
    training: TrainingSection,
    adapter: Any = None,
    model: ModelSection | None = None,
    packing: bool = False,
    end_to_end: bool = False,
    max_length: int = 64,
    checkpointed: int = 0,
    store: BoundaryStore | None = None,
    chunk: int = 16,
    base_dropout: bool = False,
    rank: int = 0,
    world: int = 1,
    streaming: dict[str, Any] | None = None,
    device: torch.device = DEVICE,
    objective: ObjectiveSettings | None = None,
    base: LoadedModel | None = None,
) -> Case:
    """`streaming`: settings of make_slots, and `pass_size`: the engine is then the one that goes layer by layer.
    `base`: a loaded base, whose slots are then used."""
    devices, section = make_devices(), model or ModelSection(name_or_path=str(folder), dtype="float32")
    base = base or load_model(section, device=device, streamed=streaming is not None and device.type != "cpu")
    weights = [frozen_tensors(layer) for _, layer in base.family.layers(base.net)]
    lora, head = adapter or LoraSettings(r=4, alpha=8.0), base.family.head_name(base.net)
    shared = shared_slots(base)
    with nullcontext() if shared is None else shared.on_host():
        attached = attach_adapter(base.net, lora, seed=training.seed, head_name=head, device=device)
    layers = [layer for _, layer in base.family.layers(base.net)]
    prepare_layers(layers, checkpointed, store)
    slots, pass_size = None, 1
    if streaming is not None:
        settings_of_slots = dict(streaming)
        pass_size = settings_of_slots.pop("pass_size", 99)
        settings_of_slots = {"tier": "host", "poison": True, **settings_of_slots}
        slots = shared or make_slots(weights, device, mapped=base.mapped, **settings_of_slots)
        stream_layers(layers, slots)
    boundaries = BoundaryStore(None) if store is None else store
    tuned = TunedModel(base, attached, boundaries, chunk_tokens=chunk, slots=slots)
    settings = BatchSettings(
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_length=max_length,
        packing=packing,
        shuffle=True,
        seed=training.seed,
        epochs=training.epochs,
        max_steps=training.max_steps,
        end_to_end=end_to_end,
    )
    minimised = objective_of(objective)
    steps = StoredSteps(rows, minimised.rows, settings, rank=rank, world=world)
    optimizer = make_optimizer(training, attached)
    records: list[StepRecord | EvaluationRecord] = []
    saved: list[int] = []
    recipe = Recipe(
        model=section,
        data=DataSection.model_validate({"train": [{"path": "rows.jsonl"}]}),
        training=training,
        output=OutputSection(dir="no-run"),
    )
    console = Console(enabled=False)
    choice = SimpleNamespace(pass_micro_batches=pass_size)
    plan: Any = SimpleNamespace(
        choice=choice, budget_bytes=None, warmup_steps=warmup_steps(training, steps.count), steps=steps.count
    )
    planned: Any = SimpleNamespace(
        rows=SimpleNamespace(objective=minimised, evaluation=None, steps=lambda *_, **__: steps),
        batch_settings=settings,
    )
    run = Run(
        Session(LoadedRecipe(recipe, Path("recipe.yaml")), devices, console, StopSignals()),
        plan,
        planned,
        tuned,
        optimizer,
        LoopState(LossScale(base.dtype == torch.float16)),
        {},
    )
    run.splitting, run.shows = None, DEFAULT_SHOWS  # type: ignore[assignment]  # an error of a step is its result
    run.record = records.append  # type: ignore[method-assign]
    run.save = lambda: saved.append(run.state.step)  # type: ignore[method-assign]
    run.session.peak_bytes = lambda: 0  # type: ignore[method-assign]
    return Case(tuned, attached, steps, optimizer, training, run, records, saved)


def four_steps(folder: Path, adapter: Any, rate: float = 2e-2, checkpointed: int = 0, **model: Any) -> Case:
    """Four steps over the same eight rows, so that the losses of two rates can be compared."""
    training = TrainingSection(
        learning_rate=rate,
        scheduler="constant",
        warmup_ratio=None,
        epochs=None,
        max_steps=4,
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
    )
    section = ModelSection(**{"name_or_path": str(folder), "dtype": "float32", **model})
    return make_case(folder, make_rows(8), training=training, adapter=adapter, checkpointed=checkpointed, model=section)


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def check_four_steps(folder: Path, adapter: Any, rate: float = 2e-2) -> None:
    """It learns, all trained tensors move and no others, and neither recomputed layers nor a resume change a bit."""
    still, whole = four_steps(folder, adapter, 0.0), four_steps(folder, adapter, rate)
    again = four_steps(folder, adapter, rate, checkpointed=2)
    before = whole.state()
    for case in (still, whole, again):
        case.run()
    after = whole.state()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    without_gradient = {name for name in after if name.endswith("k_proj.bias")}  # attention ignores a bias of all keys
    assert moved | without_gradient == set(whole.adapter.trained()) | without_gradient
    assert whole.losses[-1] < still.losses[-1]
    assert_same_bits(again.state(), after)
    stopped, resumed = four_steps(folder, adapter, rate), four_steps(folder, adapter, rate)
    resumed.run_after_a_stop(stopped, 2)
    assert stopped.losses + resumed.losses == whole.losses
    assert_same_bits(resumed.state(), after)
