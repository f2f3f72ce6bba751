"""Finishes a run: exports its result, measures tasks, collects all facts for the report, and writes it."""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from tunekit.artifacts.checkpoint import list_checkpoints, load_checkpoint
from tunekit.artifacts.report.bad_signs import bad_signs
from tunekit.artifacts.report.next_step import AFTER_VERDICT
from tunekit.artifacts.report.tasks import change_table, forgetting, score_table
from tunekit.artifacts.report.values import run_values
from tunekit.artifacts.report.write import write_report
from tunekit.artifacts.run import STOPPED_BY_TIME, TASKS_NAME, RunFolder
from tunekit.artifacts.stopped import next_commands
from tunekit.console.progress import CountProgress
from tunekit.errors import Stopped, TunekitError
from tunekit.evaluation.tasks.measure import measure_tasks
from tunekit.evaluation.tasks.run import load_tasks
from tunekit.machine.memory import device_peaks, peak_host_bytes
from tunekit.machine.signals import TimeUp, time_limit
from tunekit.machine.versions import error_words
from tunekit.metrics.classes import class_facts
from tunekit.model.quantized.weights import stored_bytes
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.rows.baselines import plain_scores
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.reading.names import shows_of
from tunekit.records import Reaction, ReportFacts, bytes_text, skipped_text
from tunekit.targets.export import export_adapter, export_model
from tunekit.targets.target import measuring_objective
from tunekit.training.run import Run
from tunekit.training.state import restore, timed
from tunekit.training.step_numbers import KEEP_BEST, last_jump, rise
from tunekit.training.time_limit import KEY
from tunekit.tuned.model import TunedModel


def finish_run(run: Run) -> None:
    """Export the result of a run that has ended, and write its report."""
    reactions = run.devices.gather(run.state.reactions)  # each rank splits its own micro-batches
    run.state.reactions = [reaction for place, reaction in enumerate(reactions) if reaction not in reactions[:place]]
    run.session.in_folder(lambda folder: _write_result(folder, run))


def _write_result(folder: RunFolder, run: Run) -> None:
    """Export the best or the last state, write the report, then mark the run as finished."""
    session, planned, state = run.session, run.planned, run.state
    recipe, console = session.loaded.recipe, session.console
    saves_best = recipe.evaluation.best is not None and state.best_step is not None
    with state.timed("export"):
        place, size_bytes = _export(folder, run, saves_best=saves_best)
    base, template = run.model.base, planned.rows.template
    is_base = run.adapter.starts_as_identity() and recipe.adapter.init_from is None
    start = "the base" if is_base else "before training"
    if recipe.evaluation.tasks:
        _measure_tasks(folder, run, compares=is_base and not recipe.adapter.trains_base)
    state.note_time(session.limit.elapsed)
    facts = report_facts(run, folder, size_bytes, saved_best=saves_best, start=start)
    facts = replace(facts, baselines=plain_scores(run.objective, planned.rows.train, planned.rows.evaluation))
    ended = STOPPED_BY_TIME if run.ended_by_time else "stopped early: no gain" if state.stopped_early else "finished"
    reason = ended if facts.verdict is None else f"{ended}; {facts.verdict}"
    write_report(folder, facts, run.plan, reason)
    folder.status(0, reason, finished=not run.ended_by_time)
    if run.ended_by_time:
        commands = next_commands(Path(recipe.output.dir), alone=run.devices.world == 1)
        step, rate = f"step {state.step} of {run.plan.steps}", f"at {run.rate():.0%} of training.learning_rate"
        console.warn(f"{KEY} ended the run after {step}, {rate}; {commands}")
    if facts.verdict is not None:
        signs = bad_signs(run_values(folder.path))  # their sentences name the change of the training
        advice = remedy(saves_best, state.step, folder)
        console.warn("; ".join([facts.verdict, *advice[1 if signs else 0 :]]))
    if facts.skipped_steps:
        console.warn(skipped_text(facts.skipped_steps))
    console.info(f"{place.name + ':':<8} {place} ({bytes_text(size_bytes)})")
    console.info(f"report:  {folder.path / 'report.html'}")
    text = planned.processor.tokenizer
    if base.family.answers and base.family.reads_ids and text and (template or text.chat_template) is not None:
        console.info(f"chat with the result: tunekit chat {shlex.quote(relative_to(folder.path))}")
    console.detail("seconds: " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in facts.seconds.items()))


def _export(folder: RunFolder, run: Run, *, saves_best: bool) -> tuple[Path, int]:
    """Export the best state if `saves_best`, else the last one. Returns the folder and its size in bytes."""
    planned, state, base, template = run.planned, run.state, run.model.base, run.planned.rows.template
    measured = state.measured_facts
    if saves_best and state.best_step != state.step:
        best = load_checkpoint(folder.checkpoints / f"step-{state.best_step:06d}")
        measured = restore(best.tensors, best.facts, run.optimizer, run.adapter).measured_facts
    run.optimizer.native.state.clear()  # writing the result may need as much memory as the optimizer's moments
    if not planned.adapter.trains_base:
        place = folder.path / "adapter"
        return place, export_adapter(place, base, run.adapter, run.objective, template, base.fingerprint, measured)
    place, section = folder.path / "model", planned.model.model_copy(update=measured)
    answering, processor = run.objective.answering, planned.processor
    return place, export_model(place, section, base, run.adapter, processor, template, answering)


def _measure_tasks(folder: RunFolder, run: Run, *, compares: bool) -> None:
    """Compute the tasks of evaluation.tasks, and write their scores into the run folder. `compares`: also the scores of
    the base."""
    session, planned, settings = run.session, run.planned, run.evaluation
    console, limit = session.console, session.limit
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
        what = str(error) if isinstance(error, TunekitError) else error_words(error)
        console.warn(f"{what}: evaluation.tasks are not measured; measure them with: {command}")
        return
    run.state.seconds |= seconds
    values = results.values()
    folder.write_json(TASKS_NAME, values)
    console.table(*score_table(values["scores"], values["before"]))
    if values["changes"]:
        console.table(*change_table(values["changes"]))
    console.warn(*forgetting(values["changes"]))


REPORTED = ("step", "eval", "sources", "search")  # keys of an evaluation's record that the report contains


def _ends(name: str, values: Sequence[float], tenth: int) -> dict[str, float]:
    """The mean of a metric over the first `tenth` steps and over the last `tenth` steps."""
    return {f"first_{name}": fmean(values[:tenth]), f"final_{name}": fmean(values[-tenth:])} if values else {}


def remedy(saved_best: bool, final_step: int, run: RunFolder) -> list[str]:
    """The advice for a run that ended badly: how to change the training, and then how to export the weights of an
    earlier step."""
    if saved_best:
        return [AFTER_VERDICT]
    earlier = [step for step, _ in list_checkpoints(run.checkpoints) if step < final_step]
    kept = f"the checkpoint of step {earlier[0]} is {relative_to(run.path)}@{earlier[0]}" if earlier else ""
    return [AFTER_VERDICT, KEEP_BEST, kept or "set training.save_steps to save checkpoints of earlier steps"]


def base_bytes(model: TunedModel) -> int:
    """The stored bytes of the base. An adapter of the whole model is not part of the network."""
    parts = [] if model.adapter is None else model.adapter.parts()
    inside = [part for part in parts if part is not (model.adapter and model.adapter.model_adapter)]
    adapter_bytes = sum(tensor.nbytes for part in inside for tensor in part.state().values())
    return stored_bytes(model.base.net) - adapter_bytes


def report_facts(run: Run, folder: RunFolder, adapter_bytes: int, *, saved_best: bool, start: str) -> ReportFacts:
    """All facts for report.json. For a resumed run, they include the time before the resume. `start`: the name of the
    model before training."""
    plan, state, records = run.plan, run.state, folder.read_metrics()
    steps = [record["loss"] for record in records if "eval" not in record]
    name = shows_of(plan.objective).headline.name
    headline = [record[name] for record in records if name in record] if name != "loss" else []
    tenth = -(-len(steps) // 10)
    evaluations = [record for record in records if "eval" in record]
    classes = {record["step"]: record.get("classes") for record in evaluations}
    losses = {record["step"]: record["eval"].get("loss") for record in evaluations}
    exported = state.best_step if saved_best else max(losses, default=None)
    before, loss = losses.get(0), losses.get(exported)
    verdict = rise(steps) if (before is None or loss is None) and not headline else None
    if before is not None and loss is not None and loss > before:
        verdict = f"the exported weights are worse than {start}: eval loss {loss:.4g}, but {before:.4g} before training"
    if verdict is None and not headline and not saved_best:
        verdict = last_jump(steps)
    rows, train_seconds = plan.rows.training, state.seconds.get("train", 0.0)
    device, peaks = run.devices.device, device_peaks(run.devices.device)
    base, elsewhere = base_bytes(run.model), 0 if run.model.slots is None else run.model.slots.elsewhere_bytes
    return ReportFacts(
        peak_requested_bytes=peaks.requested,
        peak_allocated_bytes=peaks.allocated,
        peak_reserved_bytes=peaks.reserved,
        peak_host_bytes=peak_host_bytes(),
        tokens_per_second=state.tokens / train_seconds if train_seconds else None,
        supervised_tokens_per_second=state.supervised_tokens / train_seconds if train_seconds else None,
        seconds={name: round(value, 3) for name, value in sorted(state.seconds.items())},
        rows={"read": rows.read, "trained": rows.trained, "dropped": rows.dropped, "truncated": rows.truncated},
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        predicted_bytes={device.type: plan.peak_bytes.total},
        measured_bytes={device.type: run.session.peak_bytes()},
        adapter_bytes=adapter_bytes,
        base_bytes=base,
        base_bytes_of_rank=base - elsewhere if elsewhere else None,
        trainable_parameters=plan.trainable_parameters,
        best_step=state.best_step if saved_best else None,
        final_step=state.step,
        first_loss=fmean(steps[:tenth]) if steps else None,
        final_loss=fmean(steps[-tenth:]) if steps else None,
        headline=_ends(name, headline, tenth),
        base_eval_loss=before,
        eval_loss=loss,
        verdict=verdict,
        evaluations=[{name: record[name] for name in REPORTED if name in record} for record in evaluations],
        classes=None if (counts := classes.get(exported)) is None else class_facts(counts),
        reactions=[Reaction(**reaction) for reaction in state.reactions],
        skipped_steps=state.scale.skipped_steps if state.scale.enabled else None,
        calibration=state.calibration,
        budget_bytes=plan.budget_bytes,
        starts=state.starts,
    )
