"""Begins a run: prints the plan, loads the base within its budget, attaches the adapter, checks the model (probes), and
restores the checkpoint. If the plan requires it, the longest batch is run once before step 1."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.method import needs_reference_state
from tunekit.artifacts.checkpoint import Checkpoint
from tunekit.artifacts.report.plan_page import WEIGHTS
from tunekit.companions.base import make_companions
from tunekit.console.progress import CountProgress
from tunekit.contracts import Batch, Companion, Objective, StepBatches
from tunekit.data.batching.steps import evaluation_batches
from tunekit.errors import ModelError
from tunekit.evaluation.probes import TOLERANCE, bypass_difference, logprob_difference, packing_leak
from tunekit.evaluation.scores import summed_evaluation
from tunekit.machine.devices import forked_random
from tunekit.machine.malloc import settle_heap, trim_heap
from tunekit.machine.memory import available_bytes, limit_bytes, reset_peaks
from tunekit.machine.variables import has_windows_driver
from tunekit.memory.sharding import TIER
from tunekit.memory.splitting import shape_text
from tunekit.model.load import LoadedModel, load_model
from tunekit.model.storage.inspection import remote_code
from tunekit.recipe.reading.names import shows_of
from tunekit.records import JsonObject, Plan, Reaction, bytes_text, calibration_text
from tunekit.training.initialise import initialise_adapter
from tunekit.training.optimizers import make_optimizer
from tunekit.training.run import Run
from tunekit.training.run_files import check_fingerprint, folder_bytes, forget_lost_best, with_files, write_plan
from tunekit.training.session import Planned, Session
from tunekit.training.state import LoopState, LossScale, add_seconds, restore, restore_reference
from tunekit.tuned.model import ModelRun, TunedModel
from tunekit.tuned.network import prepare_network

ORDINARY_COLLECTION = (700, 10, 10)  # Python's own thresholds
Load = Callable[[Session, Plan, Planned], LoadedModel]


def begin_run(
    session: Session, plan: Plan, planned: Planned, checkpoint: Checkpoint | None, load: Load | None = None
) -> Run:
    """Load and assemble a run in the session's run folder. `load`: a function that replaces `load_base`.

    Raises: ResourceError if the disk is too small for the run's files; and the errors of `assemble_run`.
    """
    with session.signals.at_once("before training began; nothing was trained"):
        if checkpoint is None:
            torch.set_num_threads(plan.choice.threads or torch.get_num_threads())  # the order of sums depends on it
        print_plan(session, plan)
        fingerprint = check_run(session, planned, checkpoint)
        if session.folder is not None:
            session.folder.status(None, "running")
            session.folder.require_free_bytes(folder_bytes(session, plan, planned))
        base = (load or load_base)(session, plan, planned)
        run = assemble_run(session, plan, planned, base, fingerprint, checkpoint)
    gc.set_threshold(*ORDINARY_COLLECTION)  # the command line had delayed garbage collection
    return run


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


def check_run(session: Session, planned: Planned, checkpoint: Checkpoint | None = None) -> JsonObject:
    """Make the fingerprint of the run, which includes the files of its companions (auxiliary models such as a teacher)
    and the base's remote code. This is done before the base is loaded, so that a refusal comes early.

    Raises: RunFolderError if `checkpoint`, or the run in the folder, belongs to a different run; InputError if ranks
    differ.
    """
    companions = make_companions(planned.rows.objective.companions)
    code = {key: digest for companion in companions.values() for key, digest in companion.fingerprint().items()}
    return check_fingerprint(session, planned, code | remote_code(planned.model), checkpoint)


def assemble_run(
    session: Session,
    plan: Plan,
    planned: Planned,
    base: LoadedModel,
    fingerprint: JsonObject,
    checkpoint: Checkpoint | None = None,
) -> Run:
    """Assemble the run, and write its plan to the run folder. `fingerprint`: the result of `check_run`.

    Raises: RunFolderError if files that companions read have changed; ModelError if a probe (a check of the model)
    fails.
    """
    recipe, devices = session.loaded.recipe, session.devices
    companions = make_companions(planned.rows.objective.companions)
    with session.timed("load"):
        for companion in companions.values():
            companion.load(devices.device)
    state, files = LoopState(LossScale(base.dtype == torch.float16)), None
    if recipe.adapter.calibration and checkpoint is None:  # a calibrated initialisation uses whole steps
        bare = TunedModel(base, None, companions=companions)
        planned = probe_layout(session, planned, bare, state)
        files = _begin_companions(session, planned, bare)
    model = _make_model(session, plan, planned, base, companions, state, checkpoint)
    files = _begin_companions(session, planned, model) if files is None else files
    fingerprint = with_files(session, fingerprint, files, checkpoint)
    planned = probe_layout(session, planned, model, state)
    probe_logprobs(model, planned.largest_batch)
    adapter, objective = model.adapter, planned.rows.objective
    assert adapter is not None
    if needs_reference_state(objective, planned.adapter):
        model.keep_reference()
    elif objective.loss.reference:
        probe_reference(model, objective, planned.largest_batch)
    optimizer = make_optimizer(recipe.training, adapter, base.head_modules)
    trim_heap()  # the adapter's tensors left free pieces of memory that are too small for an activation
    settle_heap()
    if checkpoint is not None:
        state = restore(checkpoint.tensors, checkpoint.facts, optimizer, adapter)
        restore_reference(checkpoint.tensors, model.reference_state or {})
        forget_lost_best(session, state)
        session.console.info(f"resuming after step {state.step} of {plan.steps}")
    for key in session.changed:  # the report shows these warnings too
        action = "resumed with the changed files, as --accept-changed allows"
        session.react(state, Reaction(f"{key}: its files have changed since the run started", action, state.step))
    if adapter.targets != plan.targets:  # the adapter's initialisation chose layers and ranks
        trained = sum(parameter.numel() for parameter in adapter.trained().values())
        total = plan.total_parameters - plan.trainable_parameters + trained
        plan = replace(plan, targets=adapter.targets, trainable_parameters=trained, total_parameters=total)
    write_plan(session, plan, None if checkpoint is None else state, fingerprint)
    run = Run(session, plan, planned, model, optimizer, state, fingerprint)
    if plan.tries_longest_batch or session.dry_run:
        _try_longest(run)
    add_seconds(state.seconds, session.seconds)
    return run


def _make_model(
    session: Session,
    plan: Plan,
    planned: Planned,
    base: LoadedModel,
    companions: Mapping[str, Companion],
    state: LoopState,
    checkpoint: Checkpoint | None,
) -> TunedModel:
    """The base with its initialised adapter and its companions (auxiliary models). If the initialisation read data (a
    calibration), its cost is stored in `state`."""
    recipe, devices = session.loaded.recipe, session.devices

    def attach() -> AttachedAdapter:
        adapter, state.calibration = initialise_adapter(
            base,
            planned,
            seed=recipe.training.seed,
            devices=devices,
            resumed=None if checkpoint is None else checkpoint.facts["layout"],
            companions=companions,
        )
        return adapter

    with session.timed("calibrate" if recipe.adapter.calibration else "load"):
        model = prepare_network(base, plan.choice, attach, devices=devices)
    model.set_router_loss(recipe.training.router_loss)
    model.companions = companions
    for companion in companions.values():
        companion.sampling_batch_size = plan.choice.sampling_batch_size
    model.repeats_rows = plan.steps > (plan.rows.steps_per_epoch or plan.steps)
    if state.calibration is not None:
        session.console.info(calibration_text(state.calibration))
    reset_peaks(devices.device)  # the report shows the peak of training, not of loading
    return model


def _begin_companions(session: Session, planned: Planned, model: TunedModel) -> dict[str, str]:
    """Let the companions (auxiliary models such as a teacher) prepare data that all steps need. Returns the sha256 of
    each file that a companion read, by recipe key."""
    run = ModelRun(model, planned.rows.objective.rows, session.devices.gather, CountProgress(session.console))
    files: dict[str, str] = {}
    with session.timed("data"):
        for companion in model.companions.values():
            companion.writes = not session.dry_run
            files |= companion.begin(run, planned.rows.all)
    return files


def _try_longest(run: Run) -> None:
    """Run the longest training batch and the longest evaluation batch once. If memory is too small, this shows before
    step 1."""
    session, largest, rows = run.session, run.planned.largest_batch, run.planned.rows.evaluation
    with session.timed("try"):
        try_longest_batch(run, largest)
        if rows is not None:
            batch = next(evaluation_batches(rows, run.objective.rows, batch_size=run.evaluation.batch_size))
            batches = [batch] * run.devices.world  # each rank tries it
            held_out = run.objective.evaluation_copy()
            summed_evaluation(run.model, held_out, batches, run.devices, on_split=run.note_split)
    if session.dry_run and run.devices.world > 1:
        session.console.info(speeds_text(measured_speeds(run, largest)))
    if not run.state.reactions:
        session.console.info(f"the longest micro-batch, {shape_text(largest)}, was tried and fits")


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
