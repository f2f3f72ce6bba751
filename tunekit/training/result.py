"""Finishes a run: exports its result, measures tasks and writes the report."""

import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tunekit.artifacts.checkpoint import load_checkpoint
from tunekit.artifacts.report.tasks import change_table, forgetting, score_table
from tunekit.artifacts.report.write import write_report
from tunekit.artifacts.run import STOPPED_BY_TIME, TASKS_NAME, RunFolder
from tunekit.artifacts.stopped import next_commands
from tunekit.console.progress import CountProgress
from tunekit.errors import Stopped, TunekitError
from tunekit.evaluation.tasks.measure import measure_tasks
from tunekit.evaluation.tasks.run import load_tasks
from tunekit.machine.signals import TimeUp, time_limit
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.recipe.bases.paths import relative_to
from tunekit.records import Plan, bytes_text, skipped_text
from tunekit.targets.export import export_adapter, export_model
from tunekit.targets.target import measuring_objective
from tunekit.training.finish import remedy, report_facts
from tunekit.training.planned import Planned
from tunekit.training.run import Run
from tunekit.training.saved_state import restore
from tunekit.training.session import Session
from tunekit.training.state import timed
from tunekit.training.time_limit import KEY


def finish_run(session: Session, plan: Plan, planned: Planned, run: Run) -> None:
    """Export the result of a run that has ended, and write its report."""
    reactions = session.devices.gather(run.state.reactions)  # each rank splits its own micro-batches
    run.state.reactions = [reaction for place, reaction in enumerate(reactions) if reaction not in reactions[:place]]
    session.in_folder(lambda folder: _write_result(session, folder, plan, planned, run))


def _write_result(session: Session, folder: RunFolder, plan: Plan, planned: Planned, run: Run) -> None:
    """Export the best or the last state, write the report, then mark the run as finished."""
    recipe, state, console = session.loaded.recipe, run.state, session.console
    saves_best = recipe.evaluation.best is not None and state.best_step is not None
    with state.timed("export"):
        place, size_bytes = _export(session, folder, planned, run, saves_best=saves_best)
    base, template = run.model.base, planned.rows.template
    is_base = run.adapter.starts_as_identity() and recipe.adapter.init_from is None
    start = "the base" if is_base else "before training"
    if recipe.evaluation.tasks:
        _measure_tasks(session, folder, planned, run, compares=is_base and not recipe.adapter.trains_base)
    state.note_time(session.limit.elapsed)
    facts = report_facts(plan, run, folder, size_bytes, saved_best=saves_best, start=start)
    ended = STOPPED_BY_TIME if run.ended_by_time else "stopped early: no gain" if state.stopped_early else "finished"
    reason = ended if facts.verdict is None else f"{ended}; {facts.verdict}"
    write_report(folder, facts, plan, reason)
    folder.status(0, reason, finished=not run.ended_by_time)
    if run.ended_by_time:
        console.warn(_stopped_text(session, plan, run))
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


def _export(session: Session, folder: RunFolder, planned: Planned, run: Run, *, saves_best: bool) -> tuple[Path, int]:
    """Export the best state if `saves_best`, else the last one. Returns the folder and its size in bytes."""
    recipe, state, base, template = session.loaded.recipe, run.state, run.model.base, planned.rows.template
    measured = state.measured_facts
    if saves_best and state.best_step != state.step:
        best = load_checkpoint(folder.checkpoints / f"step-{state.best_step:06d}")
        measured = restore(best.tensors, best.facts, run.optimizer, run.adapter).measured_facts
    run.optimizer.native.state.clear()  # writing the result may need as much memory as the optimizer's moments
    if not recipe.adapter.trains_base:
        place = folder.path / "adapter"
        return place, export_adapter(place, base, run.adapter, run.objective, template, base.fingerprint, measured)
    place, section = folder.path / "model", planned.model.model_copy(update=measured)
    answering, processor = run.objective.answering, planned.processor
    return place, export_model(place, section, base, run.adapter, processor, template, answering)


def _stopped_text(session: Session, plan: Plan, run: Run) -> str:
    """A sentence about a run that max_minutes ended: its step, its learning rate, and how to continue it."""
    step, run_path = run.state.step, Path(session.loaded.recipe.output.dir)
    rate = f"at {run.rate():.0%} of training.learning_rate"
    commands = next_commands(run_path, alone=session.devices.world == 1)
    return f"{KEY} ended the run after step {step} of {plan.steps}, {rate}; {commands}"


def _measure_tasks(session: Session, folder: RunFolder, planned: Planned, run: Run, *, compares: bool) -> None:
    """Compute the tasks of evaluation.tasks, and write their scores into the run folder. `compares`: also the scores of
    the base."""
    console, settings, limit = session.console, session.loaded.recipe.evaluation, session.limit
    command = shlex.join(["tunekit", "eval", relative_to(folder.path), "--tasks", ",".join(settings.tasks)])
    if session.devices.world > 1:
        console.warn(f"a run of several processes does not compute evaluation.tasks; compute them with: {command}")
        return
    objective, tokenizer = measuring_objective(run.model.base, planned.processor), planned.processor.tokenizer
    assert isinstance(tokenizer, LoadedTokenizer)  # plan refuses tasks for other models
    seconds: dict[str, float] = {}  # only of a measurement that ends, because the next start keeps them free
    measure = partial(measure_tasks, run.model, tokenizer, objective, devices=session.devices, compares=compares)
    try:
        if session.signals.requested is not None:
            raise Stopped("stopped before the tasks", session.signals.requested)
        bounded = nullcontext() if limit.left is None else time_limit(limit.left)
        with timed(seconds, "tasks"), session.signals.at_once("during the tasks"), bounded:
            tasks = load_tasks(settings)
            results = measure(tasks, template=planned.rows.template, progress=CountProgress(console))
            console.warn(*tasks.notes())
    except TimeUp:
        console.warn(f"{KEY} left too little time for evaluation.tasks; measure them with: {command}")
        return
    except Exception as error:  # lm-eval and its data may raise anything; the trained run must not be lost
        what = str(error) if isinstance(error, TunekitError) else f"{type(error).__name__}: {error}"
        console.warn(f"{what}: evaluation.tasks are not measured; measure them with: {command}")
        return
    run.state.seconds |= seconds
    values = results.values()
    folder.write_json(TASKS_NAME, values)
    console.table(*score_table(values["scores"], values["before"]))
    if values["changes"]:
        console.table(*change_table(values["changes"]))
    console.warn(*forgetting(values["changes"]))
