"""`tunekit train`: the whole run on one page: plan, load, attach, probe, loop, save, report.

Comes in: a recipe.  Goes out: the run folder.  Every decision was plan's; this file only obeys.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.read import load_into
from tunekit.adapters.kernels.liger import use_liger
from tunekit.artifacts.checkpoint import Checkpoint, load_checkpoint
from tunekit.artifacts.report.write import write_report
from tunekit.artifacts.run import RunFolder, is_finished
from tunekit.console import Console
from tunekit.console.progress import Progress
from tunekit.contracts import Engine, Objective
from tunekit.data.batching.windows import evaluation_batches
from tunekit.data.encoding.sources import read_template
from tunekit.errors import ResourceError, TunekitError
from tunekit.machine.devices import make_devices
from tunekit.machine.memory import limit_bytes, resident_bytes
from tunekit.machine.signals import StopSignals
from tunekit.memory.checkpointing import prepare_layers
from tunekit.memory.offload import make_store
from tunekit.memory.slots import LayerSlots
from tunekit.memory.splitting import is_out_of_memory, shape_text
from tunekit.memory.streaming import layer_weights, stream_base
from tunekit.memory.tiling import tile_layers
from tunekit.model.load import load_model
from tunekit.objectives.base import make_objective
from tunekit.planning.findings import raise_refusals
from tunekit.planning.plan import Prepared, make_plan
from tunekit.recipe.load import load_recipe
from tunekit.records import Choice, Plan, bytes_text, calibration_text
from tunekit.training.begin import Begun, begin_adapter, needed_batches, with_targets
from tunekit.training.compiling import compilable, compile_layers
from tunekit.training.engines.choice import make_engine
from tunekit.training.finish import export_adapter, report_facts
from tunekit.training.loop import run_loop
from tunekit.training.optimizers import Optimizer
from tunekit.training.run_files import begin_folder, leave_status, make_trackers, written_bytes
from tunekit.training.saved_state import restore
from tunekit.training.scaling import LossScale
from tunekit.training.session import (
    Session,
    make_optimizer,
    make_recorder,
    make_saver,
    make_splitting,
    note_split_evaluation,
    probe_model,
    try_longest_batch,
)
from tunekit.training.state import LoopParts, LoopState
from tunekit.tuned.answers import Question
from tunekit.tuned.evaluator import is_better, make_evaluator
from tunekit.tuned.model import TunedModel
from tunekit.tuned.scores import summed_evaluation

ORDINARY_COLLECTION = (700, 10, 10)  # Python's own thresholds


def train_verb(recipe_path: str, overrides: Sequence[str], resume: bool, dry_run: bool) -> None:
    """Run the recipe. Raises: TunekitError, whose exit code the command line returns."""
    loaded = load_recipe(recipe_path, overrides)
    devices = make_devices()
    console = Console(enabled=devices.is_main)
    for rewrite in loaded.rewrites:
        console.info(rewrite)
    try:
        with StopSignals(announce=devices.is_main) as signals:
            session = Session(loaded, devices, console, signals)
            if dry_run:
                with signals.at_once("in the dry run; nothing was written"):
                    _try_out(session)
            else:
                _train_in_folder(session, resume)
    finally:
        devices.close()


def _train_in_folder(session: Session, resume: bool) -> None:
    """Hold the run folder while training, and leave in status.json how it ended."""
    devices, path = session.devices, Path(session.loaded.recipe.output.dir)
    if devices.from_main(devices.is_main and resume and is_finished(path)):
        session.console.info(f"{path} holds a finished run; nothing to do")
        return
    open_folder = RunFolder.open_resume if resume else RunFolder.open_new
    session.folder = devices.on_main(lambda: open_folder(path, warn=session.console.warn))
    try:
        _train(session, resume)
    except TunekitError as error:
        leave_status(session.folder, error.exit_code, str(error))
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            leave_status(session.folder, ResourceError.exit_code, "out of memory")
            raise session.out_of_memory() from error
        leave_status(session.folder, 130 if isinstance(error, KeyboardInterrupt) else 1, type(error).__name__)
        raise
    finally:
        if session.folder is not None:
            session.folder.close()


@dataclass(frozen=True)
class _Ready:
    """Everything that the loop and the end of the run need."""

    plan: Plan
    prepared: Prepared
    model: TunedModel
    adapter: AttachedAdapter
    objective: Objective
    optimizer: Optimizer
    engine: Engine
    fingerprint: dict[str, Any]
    state: LoopState


def _train(session: Session, resume: bool) -> None:
    with session.signals.at_once("before training began; nothing was trained"):
        ready = _prepare(session, resume)
    plan, state = ready.plan, ready.state
    gc.set_threshold(*ORDINARY_COLLECTION)  # the command line had put it off
    trackers = make_trackers(session, state.step)
    with Progress(session.console, plan.steps, state.step) as progress:
        record = make_recorder(session, progress, trackers)
        save = make_saver(session, ready.optimizer, ready.adapter, ready.fingerprint)
        run_loop(_parts(session, ready, record, save), state)
    found = session.devices.gather(state.reactions)  # each rank splits its own micro-batches
    state.reactions = [reaction for place, reaction in enumerate(found) if reaction not in found[:place]]
    if trackers is not None:
        trackers.close()
    if session.folder is not None:
        _finish(session, session.folder, ready)
    session.devices.wait()


def _prepare(session: Session, resume: bool) -> _Ready:
    """Plan, load, check against what is resumed, probe, and leave in the run folder what is about to run."""
    checkpoint = session.newest_checkpoint() if resume else None
    plan, prepared = _plan(session, session.begun_choice() if resume else None)
    if session.folder is not None:
        session.folder.status(None, "running")
        session.folder.require_free_bytes(written_bytes(plan, session.loaded.recipe.training.keep_checkpoints))
    model, begun, objective, slots = _load(session, plan, prepared, checkpoint)
    adapter, plan = begun.adapter, with_targets(plan, begun.adapter)
    fingerprint = session.fingerprint(prepared.rows.fingerprint, model.base.fingerprint)
    before = checkpoint.facts["fingerprint"] if checkpoint is not None else session.begun_fingerprint()
    if before is not None:
        session.require_same(before, fingerprint)
    probe_model(plan, model, prepared.largest_batch)
    optimizer = make_optimizer(session, adapter)
    state = LoopState(calibration=begun.calibration)
    if checkpoint is not None:
        state = restore(checkpoint.tensors, checkpoint.facts, optimizer, adapter)
        session.console.info(f"going on after step {state.step} of {plan.steps}")
    begin_folder(session, plan, state.step, fingerprint)
    seed, splitting = session.loaded.recipe.training.seed, make_splitting(session, state)
    engine = make_engine(seed, slots, plan.pass_micro_batches, splitting)
    if plan.tries_longest_batch:
        with session.timed("try"):
            _try_longest(session, engine, prepared, model, objective, state)
    for part, seconds in session.seconds.items():
        state.seconds[part] = state.seconds.get(part, 0.0) + seconds
    return _Ready(plan, prepared, model, adapter, objective, optimizer, engine, fingerprint, state)


def _plan(session: Session, begun: Choice | None = None) -> tuple[Plan, Prepared]:
    """Decide everything; the main rank first, so that rows are encoded once."""
    devices = session.devices
    with session.timed("data"):
        plan, prepared = devices.main_first(lambda: make_plan(session.loaded, device=devices.device, begun=begun))
    session.baseline_bytes = resident_bytes()  # planning has imported what the run needs
    raise_refusals(plan)
    facts = plan.model
    quantized = "" if facts.quantization == "none" else f", weights in {facts.quantization}"
    session.console.info(
        f"{facts.name_or_path}: {facts.model_type}, computed in {facts.dtype}{quantized}; "
        f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters trained"
    )
    session.console.info(
        f"{plan.rows.trained:,} rows, {plan.rows.dropped:,} dropped, {plan.steps:,} steps, "
        f"{plan.supervised_tokens:,} supervised tokens; predicted peak {bytes_text(plan.peak_bytes.total)}"
    )
    for note in plan.notes:
        session.console.info(note)
    return plan, prepared


def _load(
    session: Session, plan: Plan, prepared: Prepared, checkpoint: Checkpoint | None = None
) -> tuple[TunedModel, Begun, Objective, LayerSlots | None]:
    """Base, adapter and objective, ready for the device, and the slots of a streamed base."""
    recipe = session.loaded.recipe
    if plan.budget_bytes is not None:
        limit_bytes(session.devices.device, plan.budget_bytes)
    with session.timed("load"):
        base = load_model(recipe.model, device=session.devices.device, streamed=plan.streaming != "off")
        weights = layer_weights(base)
        layers, store = base.family.layers(base.net), make_store(recipe.memory.activation_offload, base.device)
        forwards = compilable([layer for _, layer in layers]) if plan.compiled else []
        prepare_layers([layer for _, layer in layers], plan.checkpointed_layers, store)
    objective = make_objective(recipe.objective, logits_chunk_tokens=plan.logits_chunk_tokens)
    with session.timed("load" if needed_batches(recipe.adapter) == 0 else "calibrate"):
        begun = begin_adapter(
            base,
            prepared.adapter,
            recipe.model,
            seed=recipe.training.seed,
            devices=session.devices,
            objective=objective,
            windows=lambda: prepared.rows.windows(prepared.batch_settings),
            resumed=None if checkpoint is None else checkpoint.facts["layout"],
        )
        if recipe.adapter.init_from is not None:
            load_into(begun.adapter, Path(recipe.adapter.init_from), base_fingerprint=base.fingerprint)
        if recipe.memory.mlp_tile_tokens is not None:
            hidden = torch.empty(0, plan.model.hidden_size, dtype=base.dtype, device=base.device)
            tile_layers(layers, recipe.memory.mlp_tile_tokens, hidden)
        if recipe.training.kernels == "liger":
            use_liger(base.net)
        compile_layers(forwards)
        slots = stream_base(base, weights, plan.streaming)
    if begun.calibration is not None:
        session.console.info(calibration_text(begun.calibration))
    if session.devices.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the report's peak is the training's, not the loader's
    return TunedModel(base, begun.adapter, store), begun, objective, slots


def _try_longest(
    session: Session,
    engine: Engine,
    prepared: Prepared,
    model: TunedModel,
    objective: Objective,
    state: LoopState,
) -> None:
    """The longest batch of training and of evaluation, before anything depends on their going well."""
    try_longest_batch(model, objective, engine, prepared.largest_batch)
    rows = prepared.rows.evaluation
    if rows is not None:
        size = session.loaded.recipe.evaluation.batch_size
        batches = evaluation_batches(rows, batch_size=size, pad_id=prepared.tokenizer.pad_id)
        split = partial(note_split_evaluation, session, state)
        summed_evaluation(model, objective, [next(batches)], session.devices, on_split=split)
    if not state.reactions:
        session.console.info(f"the longest micro-batch, {shape_text(prepared.largest_batch)}, was tried and fits")


def _parts(session: Session, ready: _Ready, record: Any, save: Any) -> LoopParts:
    recipe, devices = session.loaded.recipe, session.devices
    plan, prepared, model, state = ready.plan, ready.prepared, ready.model, ready.state
    watched = (recipe.evaluation.best or "eval.loss").removeprefix("eval.")
    return LoopParts(
        model=model,
        objective=ready.objective,
        engine=ready.engine,
        optimizer=ready.optimizer,
        devices=devices,
        windows=prepared.rows.windows(prepared.batch_settings, rank=devices.rank, world=devices.world),
        settings=recipe.training,
        warmup_steps=plan.warmup_steps,
        scale=LossScale(model.base.dtype == torch.float16, state.loss_scale, state.good_steps, state.skipped_steps),
        record=record,
        save=save,
        evaluate=_make_evaluate(session, ready),
        is_better=lambda value, best: is_better(watched, value, best),
        watched_metric=watched if recipe.evaluation.best or recipe.evaluation.patience else None,
        saves_best=recipe.evaluation.best is not None,
        patience=recipe.evaluation.patience,
        stop_signal=lambda: session.signals.requested or 0,
        peak_bytes=session.peak_bytes,
    )


def _make_evaluate(session: Session, ready: _Ready) -> Callable[[], dict[str, float]] | None:
    """One evaluation of the eval rows; None where the recipe has none."""
    recipe, prepared = session.loaded.recipe, ready.prepared
    rows = prepared.rows
    if rows.evaluation is None:
        return None
    evaluator = make_evaluator(
        ready.model,
        ready.objective,
        prepared.tokenizer,
        session.devices,
        rows.evaluation,
        lambda: [Question(ids, reference) for ids, reference, _ in rows.evaluation_prompts()],
        recipe.evaluation,
        max_length=recipe.data.max_length,
        on_split=partial(note_split_evaluation, session, ready.state),
    )
    return lambda: evaluator.evaluate(lambda: session.signals.requested is not None)[1]


def _finish(session: Session, folder: RunFolder, ready: _Ready) -> None:
    """Export the best or the last state, report, and say that it is finished, in this order."""
    recipe, state, adapter = session.loaded.recipe, ready.state, ready.adapter
    saves_best = recipe.evaluation.best is not None and state.best_step is not None
    if saves_best and state.best_step != state.step:
        best = load_checkpoint(folder.checkpoints / f"step-{state.best_step:06d}")
        restore(best.tensors, best.facts, ready.optimizer, adapter)
    named = recipe.data.chat_template
    template = None if named is None else read_template(Path(named))
    adapter_bytes = export_adapter(folder, ready.model.base, adapter, template)
    facts = report_facts(
        ready.plan,
        state,
        ready.prepared.rows.counts,
        session.measured(ready.model),
        adapter_bytes,
        folder,
        saves_best,
    )
    write_report(folder, facts, ready.plan)
    folder.status(0, "stopped early: no gain" if state.stopped_early else "finished")
    console = session.console
    console.info(f"adapter: {folder.path / 'adapter'} ({bytes_text(adapter_bytes)})")
    console.info(f"report:  {folder.path / 'report.md'}")


def _try_out(session: Session) -> None:
    """--dry-run: load, attach, probe, the longest batch forward and backward; no update, nothing written."""
    plan, prepared = _plan(session)
    try:
        model, begun, objective, slots = _load(session, plan, prepared)
        adapter = begun.adapter
        probe_model(plan, model, prepared.largest_batch)
        make_optimizer(session, adapter)
        state = LoopState()
        seed, splitting = session.loaded.recipe.training.seed, make_splitting(session, state)
        engine = make_engine(seed, slots, plan.pass_micro_batches, splitting)
        _try_longest(session, engine, prepared, model, objective, state)
    except Exception as error:
        if is_out_of_memory(error):
            raise session.out_of_memory() from error
        raise
    measured = session.measured(model)
    peak = measured.peak_allocated_bytes or measured.host_growth_bytes
    session.console.panel(
        "dry run: everything worked, nothing was written",
        {
            "longest micro-batch": shape_text(prepared.largest_batch),
            "predicted peak": bytes_text(plan.peak_bytes.total),
            "measured peak": bytes_text(peak),
            "base": bytes_text(measured.base_bytes),
            "trained parameters": plan.trainable_parameters,
            "steps": plan.steps,
        },
    )
