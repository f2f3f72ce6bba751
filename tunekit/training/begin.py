"""Begins a run: reads its checkpoint, prints the plan, loads the base within its budget, and assembles the run."""

import gc
from collections.abc import Callable

import torch

from tunekit.artifacts.checkpoint import Checkpoint
from tunekit.artifacts.report.plan_page import WEIGHTS
from tunekit.machine.memory import available_bytes, limit_bytes
from tunekit.machine.variables import has_windows_driver
from tunekit.memory.sharding import TIER
from tunekit.model.load import LoadedModel, load_model
from tunekit.recipe.reading.names import shows_of
from tunekit.records import Plan, bytes_text
from tunekit.training import run_files
from tunekit.training.assemble import assemble_run, check_run
from tunekit.training.planned import Planned
from tunekit.training.run import Run
from tunekit.training.session import Session

ORDINARY_COLLECTION = (700, 10, 10)  # Python's own thresholds
Load = Callable[[Session, Plan, Planned], LoadedModel]


def begin_run(
    session: Session, plan: Plan, planned: Planned, checkpoint: Checkpoint | None, load: Load | None = None
) -> tuple[Plan, Run]:
    """Load and assemble a run in the session's run folder. Returns the plan with the layers that the adapter really
    adapts, and the run. `load`: a function that replaces `load_base`."""
    with session.signals.at_once("before training began; nothing was trained"):
        if checkpoint is None:
            torch.set_num_threads(plan.choice.threads or torch.get_num_threads())  # the order of sums depends on it
        print_plan(session, plan)
        fingerprint = check_run(session, planned, checkpoint)
        run_files.announce_run(session, plan, planned)
        base = (load or load_base)(session, plan, planned)
        plan, run = assemble_run(session, plan, planned, base, fingerprint, checkpoint)
    gc.set_threshold(*ORDINARY_COLLECTION)  # the command line had delayed garbage collection
    return plan, run


def load_base(session: Session, plan: Plan, planned: Planned) -> LoadedModel:
    """Load the base within the memory budget."""
    device = session.devices.device
    if plan.budget_bytes is not None:
        limit_bytes(device, plan.budget_bytes)
    elif device.type == "cuda" and has_windows_driver():  # it would move memory above the card's to the host
        limit_bytes(device, available_bytes(device) or 0)
    session.console.info(f"loading {plan.model.name_or_path} ({bytes_text(plan.peak_bytes.weights)} in memory) ...")
    with session.timed("load"):
        if plan.choice.streaming == TIER:  # the main rank first: it packs the weights into a cache file
            return session.devices.main_first(lambda: load_model(planned.model, device=device, sharded=True))
        streamed, streamed_head = plan.choice.streaming != "off", plan.choice.streamed_head
        return load_model(planned.model, device=device, streamed=streamed, streamed_head=streamed_head)


def print_plan(session: Session, plan: Plan) -> None:
    """Print the most important facts of the plan. The trials of a sweep print a line only once."""
    console, facts, rows = session.console, plan.model, plan.rows.training
    peaks = session.devices.gather([bytes_text(plan.peak_bytes.total)])
    weights = WEIGHTS.get(facts.quantization, facts.quantization)
    quantized = "" if facts.quantization == "none" else f", weights in {weights}"
    lines = [
        f"{facts.name_or_path}: {facts.model_type}, computed in {facts.dtype}{quantized}; "
        f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters trained",
        f"{rows.trained:,} rows, {rows.dropped:,} dropped, {plan.steps:,} steps, {plan.supervised_tokens:,} "
        f"{shows_of(plan.objective).units}; predicted peak {', '.join(peaks)}"
        f"{' on the ranks' if len(peaks) > 1 else ''}",
        *plan.notes,
    ]
    console.info(*(line for line in lines if line not in session.described))
    session.described.update(lines)
