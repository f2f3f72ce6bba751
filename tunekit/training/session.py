"""One process of a run: what it has at hand, and the steps around the loop that train.py puts in order.

Comes in: the recipe, devices, console, signals.  Goes out: optimizer, probes, fingerprint, saving.  Next: train.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from tunekit.adapters.attach import AttachedAdapter
from tunekit.artifacts.checkpoint import Checkpoint, load_newest, save_checkpoint
from tunekit.artifacts.fingerprint import make_fingerprint, require_same, resume_notes
from tunekit.artifacts.run import RunFolder
from tunekit.artifacts.trackers import Trackers
from tunekit.console import Console
from tunekit.console.progress import Progress
from tunekit.contracts import Batch, Engine, Objective, Window
from tunekit.errors import ModelError, ResourceError
from tunekit.machine.devices import Devices
from tunekit.machine.environment import accelerator_names, library_versions
from tunekit.machine.malloc import settle_heap, trim_heap
from tunekit.machine.memory import peak_host_bytes
from tunekit.machine.signals import StopSignals
from tunekit.memory.splitting import Splitting, shape_text
from tunekit.model.quantized.weights import stored_bytes
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import Choice, EvaluationRecord, Plan, Reaction, StepRecord
from tunekit.training.finish import Measured
from tunekit.training.optimizers import Group, Optimizer
from tunekit.training.saved_state import checkpoint_facts, checkpoint_tensors
from tunekit.training.state import LoopState
from tunekit.tuned.model import TunedModel
from tunekit.tuned.probes import logprob_difference, packing_leak, tolerance

BEFORE_TRAINING = -1  # the step of a window that is only tried


@dataclass
class Session:
    """What one process has at hand; `folder` only on the main rank of a run that writes."""

    loaded: LoadedRecipe
    devices: Devices
    console: Console
    signals: StopSignals
    folder: RunFolder | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    baseline_bytes: int = 0  # what the process had, libraries imported, before the base was loaded

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's time to `part` of the report's seconds."""
        started = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, the same on every rank."""

        def read() -> Checkpoint | None:
            return None if self.folder is None else load_newest(self.folder)

        checkpoint: Checkpoint | None = self.devices.from_main(self.devices.on_main(read))
        if checkpoint is not None:
            torch.set_num_threads(int(checkpoint.facts["threads"]))  # the order of sums depends on it
        return checkpoint

    def begun_choice(self) -> Choice | None:
        """What the plan of the run in this folder had chosen: a resume makes the same micro-batches, whatever is free
        now."""

        def read() -> Any:
            return None if self.folder is None else self.folder.read_json("plan.json")

        plan = self.devices.from_main(self.devices.on_main(read))
        if not isinstance(plan, dict) or "micro_batch_size" not in plan:
            return None
        names = [field.name for field in fields(Choice)]
        return Choice(**{name: plan[name] for name in names})

    def begun_fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint of a run that was begun in this folder and has no checkpoint yet."""

        def read() -> Any:
            begun = self.folder is not None and (self.folder.path / "plan.json").exists()
            return self.folder.read_json("environment.json") if self.folder is not None and begun else None

        environment = self.devices.from_main(self.devices.on_main(read))
        return None if environment is None else environment.get("fingerprint")

    def require_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Refuse to go on with another recipe, data, base or version. Raises: RunFolderError naming each difference."""
        require_same(old, new, lines=self.loaded.lines, file=str(self.loaded.path))
        for note in resume_notes(old, new):
            self.console.warn(note)

    def fingerprint(self, data: str, base: str | None) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        names = accelerator_names()
        return make_fingerprint(
            self.loaded.recipe.model_dump(mode="json"),
            data=data,
            base=base or "",
            versions=library_versions(),
            device=self.devices.device.type,
            accelerator=names[0] if self.devices.device.type == "cuda" else None,
            threads=torch.get_num_threads(),
        )

    def out_of_memory(self) -> ResourceError:
        """The one-line error for a process that ran out of memory, with what it had."""
        if self.devices.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            had = f"peak {allocated} bytes allocated, {reserved} reserved"
        else:
            had = f"peak {peak_host_bytes()} bytes on the host"
        budget = self.loaded.recipe.memory.budget
        first = (
            "set memory.budget to what the run may take (plan then chooses)" if budget is None else "raise the budget"
        )
        how = f"{first}, lower data.max_length, or quantize the base with model.quantization: nf4"
        return ResourceError(f"out of memory ({had})", how)

    def measured(self, model: TunedModel) -> Measured:
        """Peaks of this process."""
        cuda = self.devices.device.type == "cuda"
        peak = peak_host_bytes()
        return Measured(
            peak_allocated_bytes=torch.cuda.max_memory_allocated() if cuda else None,
            peak_reserved_bytes=torch.cuda.max_memory_reserved() if cuda else None,
            peak_host_bytes=peak,
            host_growth_bytes=max(0, peak - self.baseline_bytes),
            base_bytes=stored_bytes(model.base.net) - _adapter_bytes(model),
        )

    def peak_bytes(self) -> int:
        """Peak so far: allocated on a CUDA device, of the process on a CPU."""
        return torch.cuda.max_memory_allocated() if self.devices.device.type == "cuda" else peak_host_bytes()


def _adapter_bytes(model: TunedModel) -> int:
    """Bytes of the adapter's own tensors that lie inside the network; those of the whole model lie beside it."""
    parts = [] if model.adapter is None else model.adapter.parts()
    inside = [part for part in parts if part is not (model.adapter and model.adapter.model_adapter)]
    return sum(tensor.numel() * tensor.element_size() for part in inside for tensor in part.state().values())


def make_optimizer(session: Session, adapter: AttachedAdapter) -> Optimizer:
    """The optimizer over the adapter's groups."""
    training = session.loaded.recipe.training
    groups = [Group(tuple(names), rate, decays) for names, rate, decays in adapter.groups(training)]
    optimizer = Optimizer(training, groups, adapter.trained())
    trim_heap()  # the adapter's own tensors left pieces between small objects, too short for an activation
    settle_heap()
    return optimizer


def probe_model(plan: Plan, model: TunedModel, batch: Batch) -> None:
    """Make the load-time probes, with ids of the batch, and act as plan announced.

    Raises: ModelError where a result could not be trusted.
    """
    limit = tolerance(model.base.dtype)
    if plan.packing:
        leak = packing_leak(model, batch.input_ids)
        if not leak <= limit:
            raise ModelError(
                f"packed rows see each other in {plan.model.model_type} (hidden states differ by {leak:.1e})",
                "set data.packing: false",
                key="data.packing",
            )
    difference = logprob_difference(model, batch.input_ids)
    if not difference <= limit:
        raise ModelError(
            f"log-probabilities computed in chunks differ from the model's own by {difference:.1e} (relative)",
            "this architecture's output projection is not supported; choose another base",
            key="model.name_or_path",
        )


def make_splitting(session: Session, state: LoopState) -> Splitting:
    """What a micro-batch that runs out of memory leads to: told at once, kept with the state for report and resume."""

    def react(reaction: Reaction) -> None:
        state.reactions.append(asdict(reaction))
        state.split_tokens = splitting.tokens
        session.console.warn(f"step {reaction.step}: {reaction.probe}; {reaction.action}")

    splitting = Splitting(react, state.split_tokens)
    return splitting


def note_split_evaluation(session: Session, state: LoopState, batch: Batch) -> None:
    """Tell and keep that an evaluation batch ran out of memory; each shape once."""
    what = f"an evaluation batch of {shape_text(batch)} ran out of memory"
    if all(reaction["probe"] != what for reaction in state.reactions):
        state.reactions.append(asdict(Reaction(what, "split in two; its sums are the same", state.step)))
        session.console.warn(f"step {state.step}: {what}; split in two")


def try_longest_batch(model: TunedModel, objective: Objective, engine: Engine, batch: Batch) -> None:
    """Forward and backward of the longest micro-batch, without an update.

    No gradient and no random number stays behind: what is trained afterwards is the same to the bit.
    """
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), model.training_mode(True):
        engine.run_window(model, objective, Window(BEFORE_TRAINING, 0.0, (0,), (batch,)), objective.units(batch))
    model.clear_gradient()


def make_recorder(
    session: Session, progress: Progress, trackers: Trackers | None
) -> Callable[[StepRecord | EvaluationRecord], None]:
    """Where records go: metrics.jsonl, the progress line, the trackers; nowhere on other ranks."""

    def record(value: StepRecord | EvaluationRecord) -> None:
        if session.folder is None:
            return
        session.folder.append_metrics(value)
        if isinstance(value, StepRecord):
            progress.update(value)
            numbers = {"loss": value.loss, "learning_rate": value.learning_rate, "grad_norm": value.grad_norm}
            numbers["tokens_per_second"] = value.tokens_per_second
        else:
            progress.evaluation(value)
            numbers = {f"eval/{name}": number for name, number in value.metrics.items()}
        if trackers is not None:
            trackers.log(numbers, value.step)

    return record


def make_saver(
    session: Session, optimizer: Optimizer, adapter: AttachedAdapter, fingerprint: dict[str, Any]
) -> Callable[[LoopState], None]:
    """Writes a checkpoint on the main rank; an error of it stops every rank."""
    recipe = session.loaded.recipe

    def save(state: LoopState) -> None:
        def write() -> None:
            if session.folder is None:
                return
            protected = {state.best_step} if recipe.evaluation.best and state.best_step is not None else set()
            with session.signals.critical():
                save_checkpoint(
                    session.folder,
                    state.step,
                    checkpoint_tensors(optimizer, adapter),
                    checkpoint_facts(optimizer, state, fingerprint),
                    keep=recipe.training.keep_checkpoints,
                    protect=protected,
                )

        session.devices.on_main(write)

    return save
