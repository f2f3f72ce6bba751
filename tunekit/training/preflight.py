"""Checks before step 1: probes of the model, a run of the longest batch, and the speed of each rank."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from tunekit.contracts import Batch, Objective, StepBatches
from tunekit.errors import ModelError
from tunekit.evaluation.probes import TOLERANCE, bypass_difference, logprob_difference, packing_leak
from tunekit.machine.devices import forked_random
from tunekit.records import Reaction
from tunekit.training.run import Run
from tunekit.training.session import Planned, Session
from tunekit.training.state import LoopState
from tunekit.tuned.model import TunedModel

BEFORE_TRAINING = -1  # the number of a dry-run step
TIMED = 3  # the first time may include the compilation of kernels
NEARLY_EQUAL = 0.9  # speeds of ranks that differ by less are called equal


def probe_layout(session: Session, planned: Planned, model: TunedModel, state: LoopState) -> Planned:
    """Check, on token ids of the run, whether rows in the same sequence can attend to each other. If they can and the
    recipe does not set data.packing, return `planned` with padded rows.

    Raises: ModelError if they can and the recipe sets data.packing.
    """
    settings, batch = planned.batch_settings, planned.largest_batch
    if not (settings.packing or settings.end_to_end):
        return planned
    leak = packing_leak(model, batch.inputs["input_ids"])
    if leak <= TOLERANCE[model.base.dtype]:
        return planned
    what = f"packed rows attend to each other in {model.base.facts.model_type} (hidden states differ by {leak:.1e})"
    if settings.packing:
        raise ModelError(what, "set data.packing: false", key="data.packing")
    session.react(state, Reaction(what, "rows are padded instead", state.step))
    objective = planned.rows.objective.laid_out(end_to_end=False)
    padded = objective.rows.collate([[row] for row in batch.rows])
    rows = replace(planned.rows, objective=objective)
    return replace(planned, rows=rows, batch_settings=replace(settings, end_to_end=False), largest_batch=padded)


def probe_reference(model: TunedModel, objective: Objective, batch: Batch) -> None:
    """Check that the base with its adapter bypassed equals the model at step 0. The objective uses the bypassed model
    as its reference.

    Raises: ModelError if they differ.
    """
    moved = bypass_difference(model, batch.inputs["input_ids"])
    if not moved <= TOLERANCE[model.base.dtype]:
        what = (
            f"the base with its adapter bypassed differs from the model at step 0 (hidden states differ by {moved:.1e})"
        )
        how = (
            f"the objective {objective.name} compares with the model at step 0; choose another adapter.method or "
            "adapter.start"
        )
        raise ModelError(what, how, key="adapter.method")


def probe_logprobs(model: TunedModel, batch: Batch) -> None:
    """Compare log-probabilities that are computed in chunks with log-probabilities from the model's full logits, on
    token ids of the batch.

    Raises: ModelError if they differ.
    """
    if not model.base.family.answers:
        return
    difference = logprob_difference(model, batch.inputs)
    if not difference <= TOLERANCE[model.base.dtype]:
        what = f"log-probabilities computed in chunks differ from the model's own by {difference:.1e} (relative)"
        how = "the output projection of this architecture is not supported; choose another base"
        raise ModelError(what, how, key="model.name_or_path")


def dry_run_step(run: Run, batch: Batch) -> StepBatches:
    """A dry-run step with this batch, prepared by the objective."""
    step = StepBatches(BEFORE_TRAINING, 0.0, (0,), (batch,))
    return run.objective.prepare_step(run.view(step), step)


def measured_speeds(run: Run, batch: Batch) -> list[float]:
    """The speed of each rank: tokens per second of forward and backward of the batch, the fastest of TIMED times. One
    rank at a time, because ranks may share a processor."""
    step, speeds = dry_run_step(run, batch), list[float]()
    for rank in range(run.devices.world):
        speed = _speed(run, step) if rank == run.devices.rank else 0.0
        speeds.append(sum(run.devices.gather([speed])))
    return speeds


def speeds_text(speeds: Sequence[float]) -> str:
    """A sentence about the speeds of the ranks. If they differ, it has the setting that divides the work by speed."""
    text = f"tokens per second of each rank: {', '.join(f'{speed:,.0f}' for speed in speeds)}"
    if min(speeds) > NEARLY_EQUAL * max(speeds):
        return text
    shares = ", ".join(f"{speed / min(speeds):.2g}" for speed in speeds)
    return f"{text}; with training.rank_speeds: [{shares}], faster ranks get more micro-batches"


def _speed(run: Run, step: StepBatches) -> float:
    device, seconds = run.model.device, []
    with forked_random(device), run.model.training_mode(True):
        for _ in range(TIMED):
            started = time.perf_counter()
            run.try_batch(step)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - started)
    run.model.clear_gradient()
    return step.batches[0].tokens / min(seconds)


def try_longest_batch(run: Run, batch: Batch) -> None:
    """Run forward and backward of the longest micro-batch, without an update.

    Afterwards gradients are cleared and the random state is restored, so that training has the same bits as without
    this call.
    """
    with forked_random(run.model.device), run.model.training_mode(True):
        run.try_batch(dry_run_step(run, batch), watches_gradients=not run.adapter.settings.trains_base)
    run.model.clear_gradient()
