"""`tunekit train`: runs a recipe and writes its run folder: plan, load, train, export, report.

The plan makes all decisions; this file follows them.
"""

import gc
import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunekit.artifacts.checkpoint import load_checkpoint
from tunekit.artifacts.report.next_step import after_training
from tunekit.artifacts.report.tasks import change_table, forgetting, score_table
from tunekit.artifacts.report.values import run_values
from tunekit.artifacts.report.write import write_report
from tunekit.artifacts.run import TASKS_NAME, RunFolder
from tunekit.console import Console
from tunekit.console.progress import CountProgress, StepProgress
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.errors import InputError, Stopped, TunekitError, is_out_of_memory
from tunekit.evaluation.tasks.measure import measure_tasks
from tunekit.evaluation.tasks.run import load_tasks
from tunekit.files.durable import json_result
from tunekit.machine.devices import deterministic_kernels, make_devices
from tunekit.machine.memory import limit_bytes
from tunekit.machine.signals import StopSignals
from tunekit.memory.sharding import TIER
from tunekit.memory.splitting import shape_text
from tunekit.model.load import LoadedModel, load_model
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.planning.session import plan_session, print_plan
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.reading.names import shows_of
from tunekit.records import Plan, bytes_text, skipped_text
from tunekit.targets.export import export_adapter, export_model
from tunekit.targets.target import measuring_objective
from tunekit.training import run_files
from tunekit.training.assemble import assemble_run, check_run
from tunekit.training.engines.window import LoopSteps, run_alone
from tunekit.training.finish import remedy, report_facts
from tunekit.training.lane import Load
from tunekit.training.loop import loop_steps
from tunekit.training.planned import Planned
from tunekit.training.ranks import check_command
from tunekit.training.saved_state import restore
from tunekit.training.session import Session
from tunekit.training.state import Run, timed

ORDINARY_COLLECTION = (700, 10, 10)  # Python's own thresholds


def train_verb(
    loaded: LoadedRecipe,
    resume: bool,
    dry_run: bool,
    overwrite: bool = False,
    json_file: str | None = None,
    accepted: Sequence[str] = (),
) -> None:
    """Run the recipe. `accepted`: keys whose files may have changed since the resumed run.

    Raises: TunekitError; the command line returns its exit code.
    """
    if overwrite and (resume or dry_run):
        raise InputError(
            f"--overwrite starts a new run, but {'--resume' if resume else '--dry-run'} does not", "use one of them"
        )
    if accepted and not resume:
        raise InputError("--accept-changed only has an effect with --resume", "add --resume, or remove it")
    refuse_to_replace("--json", json_file, loaded)
    refuse_to_replace("output.dir: the run's file", str(Path(loaded.recipe.output.dir) / "metrics.jsonl"), loaded)
    write_result = json_result(json_file)
    devices = make_devices()
    console = Console(enabled=devices.is_main, json_file=json_file)
    console.info(*loaded.rewrites)
    with devices:
        deterministic = deterministic_kernels(loaded.recipe.training.deterministic)
        with StopSignals(announce=devices.is_main) as signals, deterministic:
            session, path = (
                Session(loaded, devices, console, signals, dry_run, tuple(accepted)),
                Path(loaded.recipe.output.dir),
            )
            check_command(session, {"--resume": resume, "--dry-run": dry_run, "--overwrite": overwrite})
            if dry_run:
                with signals.at_once("during the dry run; nothing was written"):
                    result = _try_out(session)
            elif devices.from_main(devices.is_main and resume and run_files.is_run_finished(session)):
                console.info(f"{path} contains a finished run; nothing to do")
            else:
                with run_files.locked_folder(session, path, resume, overwrite):
                    train_session(session, resume)
                values = None if session.folder is None else run_values(path)
                if values is not None and "verdict" not in values.report:  # a warning has named its remedy
                    console.next_steps(after_training(values))
            if devices.is_main:
                write_result(result if dry_run else json.loads((path / "report.json").read_bytes()))


def train_session(session: Session, resume: bool) -> None:
    """Train in the session's run folder: plan, load, train, export, report.

    Raises: Stopped at the session's last step, or after a stop signal.
    """
    run_alone(session_steps(session, resume))


def session_steps(
    session: Session, resume: bool, planned_run: tuple[Plan, Planned] | None = None, load: Load | None = None
) -> LoopSteps:
    """A generator form of `train_session`: yields each window (the micro-batches of a step), which the caller runs.

    `planned_run`: the result of `plan_session`, if it was called before. `load`: a function that replaces `load_base`.
    """
    with session.signals.at_once("before training began; nothing was trained"):
        checkpoint = run_files.newest_checkpoint(session) if resume else None
        plan, planned = planned_run or plan_session(session, run_files.previous_execution(session) if resume else None)
        if checkpoint is None:
            if resume:
                session.console.info(
                    f"{session.loaded.recipe.output.dir} has no checkpoint; the run starts from the beginning"
                )
            torch.set_num_threads(plan.choice.threads or torch.get_num_threads())  # the order of sums depends on it
        print_plan(session, plan)
        fingerprint = check_run(session, planned, checkpoint)
        run_files.announce_run(session, plan, planned)
        base = (load or load_base)(session, plan, planned)
        plan, run = assemble_run(session, plan, planned, base, fingerprint, checkpoint)
    gc.set_threshold(*ORDINARY_COLLECTION)  # the command line had delayed garbage collection
    trackers = run_files.make_trackers(session, run.state.step)
    progress = StepProgress(session.console, plan.steps, budget_bytes=plan.budget_bytes, shows=shows_of(plan.objective))
    with trackers, progress:
        run.record, run.starting = run_files.make_recorder(session, progress, trackers), progress.start
        yield from loop_steps(run)
    reactions = session.devices.gather(run.state.reactions)  # each rank splits its own micro-batches
    run.state.reactions = [reaction for place, reaction in enumerate(reactions) if reaction not in reactions[:place]]
    session.in_folder(lambda folder: _finish(session, folder, plan, planned, run))


def _try_out(session: Session) -> dict[str, Any]:
    """Perform --dry-run: load the model and run the longest batch forward and backward, without an update. Writes
    nothing."""
    plan, planned = plan_session(session)
    torch.set_num_threads(plan.choice.threads or torch.get_num_threads())
    print_plan(session, plan)
    fingerprint = check_run(session, planned)
    try:
        plan, run = assemble_run(session, plan, planned, load_base(session, plan, planned), fingerprint)
    except Exception as error:
        if is_out_of_memory(error):
            raise session.out_of_memory() from error
        raise
    measured = session.measured(run.model)
    peak = measured.peaks.allocated or measured.host_growth_bytes
    session.console.panel(
        "dry run: everything worked, nothing was written",
        {
            "longest micro-batch": shape_text(planned.largest_batch),
            "predicted peak": bytes_text(plan.peak_bytes.total),
            "measured peak": bytes_text(peak),
            "base": bytes_text(measured.base_bytes),
            "trained parameters": plan.trainable_parameters,
            "steps": plan.steps,
        },
    )
    return {
        "predicted_bytes": plan.peak_bytes.total,
        "measured_bytes": peak,
        "base_bytes": measured.base_bytes,
        "trainable_parameters": plan.trainable_parameters,
        "steps": plan.steps,
    }


def load_base(session: Session, plan: Plan, planned: Planned) -> LoadedModel:
    """Load the base within the memory budget."""
    device = session.devices.device
    if plan.budget_bytes is not None:
        limit_bytes(device, plan.budget_bytes)
    session.console.info(f"loading {plan.model.name_or_path} ({bytes_text(plan.peak_bytes.weights)} in memory) ...")
    with session.timed("load"):
        waits, head_waits = plan.choice.streaming != "off", plan.choice.streamed_head
        if plan.choice.streaming == TIER:  # the main rank first: it packs the weights into a cache file
            return session.devices.main_first(lambda: load_model(planned.model, device=device, sharded=True))
        return load_model(planned.model, device=device, streamed=waits, streamed_head=head_waits)


def _finish(session: Session, folder: RunFolder, plan: Plan, planned: Planned, run: Run) -> None:
    """Export the best or the last state, write the report, then mark the run as finished."""
    recipe, state, console = session.loaded.recipe, run.state, session.console
    saves_best = recipe.evaluation.best is not None and state.best_step is not None
    measured = state.measured_facts
    if saves_best and state.best_step != state.step:
        best = load_checkpoint(folder.checkpoints / f"step-{state.best_step:06d}")
        measured = restore(best.tensors, best.facts, run.optimizer, run.adapter).measured_facts
    base, template = run.model.base, planned.rows.template
    run.optimizer.native.state.clear()  # writing the result may need as much memory as the optimizer's moments
    place = folder.path / ("model" if recipe.adapter.trains_base else "adapter")
    if recipe.adapter.trains_base:
        answering, section = run.objective.answering, planned.model.model_copy(update=measured)
        size_bytes = export_model(place, section, base, run.adapter, planned.processor, template, answering)
    else:
        size_bytes = export_adapter(place, base, run.adapter, run.objective, template, base.fingerprint, measured)
    is_base = run.adapter.starts_as_identity() and recipe.adapter.init_from is None
    start = "the base" if is_base else "before training"
    if recipe.evaluation.tasks:
        _measure_tasks(session, folder, planned, run, compares=is_base and not recipe.adapter.trains_base)
    facts = report_facts(plan, state, session.measured(run.model), size_bytes, folder, saves_best, start)
    write_report(folder, facts, plan)
    ended = "stopped early: no gain" if state.stopped_early else "finished"
    folder.status(0, ended if facts.verdict is None else f"{ended}; {facts.verdict}")
    if facts.verdict is not None:
        console.warn(f"{facts.verdict}; {remedy(saves_best, state.step, folder)}")
    if facts.skipped_steps:
        console.warn(skipped_text(facts.skipped_steps))
    console.info(f"{place.name + ':':<8} {place} ({bytes_text(size_bytes)})")
    console.info(f"report:  {folder.path / 'report.html'}")
    text = planned.processor.tokenizer
    if base.family.answers and base.family.reads_ids and text and (template or text.chat_template) is not None:
        console.info(f"chat with the result: tunekit chat {shlex.quote(relative_to(folder.path))}")
    console.detail("seconds: " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in facts.seconds.items()))


def _measure_tasks(session: Session, folder: RunFolder, planned: Planned, run: Run, *, compares: bool) -> None:
    """Compute the tasks of evaluation.tasks, and write their scores into the run folder. `compares`: also the scores of
    the base."""
    console, settings = session.console, session.loaded.recipe.evaluation
    command = shlex.join(["tunekit", "eval", relative_to(folder.path), "--tasks", ",".join(settings.tasks)])
    if session.devices.world > 1:
        console.warn(f"a run of several processes does not compute evaluation.tasks; compute them with: {command}")
        return
    objective, tokenizer = measuring_objective(run.model.base, planned.processor), planned.processor.tokenizer
    assert isinstance(tokenizer, LoadedTokenizer)  # plan refuses tasks for other models
    measure = partial(measure_tasks, run.model, tokenizer, objective, devices=session.devices, compares=compares)
    try:
        if session.signals.requested is not None:
            raise Stopped("stopped before the tasks", session.signals.requested)
        with timed(run.state.seconds, "evaluate"), session.signals.at_once("during the tasks"):
            results = measure(load_tasks(settings), template=planned.rows.template, progress=CountProgress(console))
    except Exception as error:  # lm-eval and its data may raise anything; the trained run must not be lost
        what = str(error) if isinstance(error, TunekitError) else f"{type(error).__name__}: {error}"
        console.warn(f"{what}: evaluation.tasks are not measured; measure them with: {command}")
        return
    values = results.values()
    folder.write_json(TASKS_NAME, values)
    console.table(*score_table(values["scores"], values["before"]))
    if values["changes"]:
        console.table(*change_table(values["changes"]))
    console.warn(*forgetting(values["changes"]))
