"""`tunekit train`: runs a recipe and writes its run folder: plan, load, train, export, report.

The plan makes all decisions; this file follows them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from tunekit.artifacts.report.bad_signs import bad_signs
from tunekit.artifacts.report.next_step import after_training
from tunekit.artifacts.report.values import run_values
from tunekit.console import Console
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.errors import InputError, is_out_of_memory
from tunekit.files.durable import json_result
from tunekit.machine.devices import deterministic_kernels, make_devices
from tunekit.machine.signals import StopSignals
from tunekit.memory.splitting import shape_text
from tunekit.planning.notes import fitting_text
from tunekit.planning.ranks import plan_session
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import JsonObject, bytes_text
from tunekit.training import run_files
from tunekit.training.begin import assemble_run, begin_run, check_run, load_base, print_plan
from tunekit.training.ranks import check_command
from tunekit.training.result import base_bytes, finish_run
from tunekit.training.session import Session
from tunekit.training.time_limit import TimeLimit


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
            limit, path = TimeLimit(loaded.recipe.training.limit_seconds), Path(loaded.recipe.output.dir)
            session = Session(loaded, devices, console, signals, dry_run, tuple(accepted), limit=limit)
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
                if values is not None:
                    console.warn(*bad_signs(values))
                if values is not None and "verdict" not in values.report:  # a warning has named its remedy
                    console.next_steps(after_training(values))
            if devices.is_main:
                write_result(result if dry_run else json.loads((path / "report.json").read_bytes()))


def train_session(session: Session, resume: bool) -> None:
    """Train in the session's run folder: plan, load, train, export, report.

    Raises: Stopped at the session's last step, or after a stop signal.
    """
    with session.signals.at_once("before training began; nothing was trained"):
        checkpoint = run_files.read_checkpoint(session, resume)
        plan, planned = plan_session(session, run_files.previous_execution(session) if resume else None)
    run = begin_run(session, plan, planned, checkpoint)
    run.train()
    finish_run(run)


def _try_out(session: Session) -> JsonObject:
    """Perform --dry-run: load the model and run the longest batch forward and backward, without an update. Writes
    nothing."""
    plan, planned = plan_session(session)
    torch.set_num_threads(plan.choice.threads or torch.get_num_threads())
    print_plan(session, plan)
    fingerprint = check_run(session, planned)
    try:
        run = assemble_run(session, plan, planned, load_base(session, plan, planned), fingerprint)
        plan = run.plan
    except Exception as error:
        if is_out_of_memory(error):
            raise session.out_of_memory() from error
        raise
    peak, base = session.peak_bytes(), base_bytes(run.model)
    session.console.panel(
        "dry run: everything worked, nothing was written",
        {
            "longest micro-batch": shape_text(planned.largest_batch),
            "predicted peak": bytes_text(plan.peak_bytes.total),
            "measured peak": bytes_text(peak),
            "base": bytes_text(base),
            "trained parameters": plan.trainable_parameters,
            "steps": plan.steps,
        },
    )
    if session.limit.seconds is not None:  # the longest micro-batch takes longer than others
        left = session.limit.seconds - session.limit.elapsed - run.ending.seconds(run.state)
        step_seconds = run.state.seconds["try"] * run.training.gradient_accumulation_steps
        session.console.info(
            fitting_text(session.loaded.recipe, plan.steps, left, step_seconds, "the longest micro-batch")
        )
    return {
        "predicted_bytes": plan.peak_bytes.total,
        "measured_bytes": peak,
        "base_bytes": base,
        "trainable_parameters": plan.trainable_parameters,
        "steps": plan.steps,
    }
