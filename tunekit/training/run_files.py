"""Reads and writes the files of a run folder: status, plan, environment, records and checkpoints. The exported adapter
is written elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from tunekit.adapters.folder.config import TENSORS_NAME
from tunekit.adapters.method import needs_reference_state
from tunekit.artifacts.checkpoint import Checkpoint, load_newest, rotate
from tunekit.artifacts.fingerprint import flat_values, make_fingerprint, recipe_values, require_same, resume_notes
from tunekit.artifacts.report.pictures import picture_name
from tunekit.artifacts.report.values import Values
from tunekit.artifacts.run import EXPORTS, RECORDS, ROWS_NAME, TASKS_NAME, RunFolder, is_finished, read_json
from tunekit.artifacts.stopped import find_result
from tunekit.artifacts.trackers import TrackedRun, Trackers
from tunekit.data.encoding.images import png_bytes
from tunekit.errors import ResourceError, RunFolderError, Stopped, TunekitError, is_out_of_memory
from tunekit.evaluation.evaluator import Evaluation
from tunekit.evaluation.row_losses import RowLosses
from tunekit.files.durable import unlink
from tunekit.files.untrusted import sha256_of
from tunekit.machine.environment import accelerator_names, library_versions, read_environment
from tunekit.model.compute import resolve_dtype
from tunekit.model.load import base_fingerprint
from tunekit.recipe.load import dump_recipe
from tunekit.records import EvaluationRecord, ExecutionSettings, JsonObject, Plan, StepRecord
from tunekit.training.ranks import check_fingerprints, check_folder_is_shared
from tunekit.training.session import Planned, Session
from tunekit.training.state import LoopState

EARLIER_ROWS = "earlier"  # in evaluation_rows.json: the rows before the evaluation of a run that max_minutes ended
OPTIMIZER_COPIES = 3  # weights and two moments: float32 copies of each trained number in a checkpoint


@contextmanager
def locked_folder(session: Session, path: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """A context manager that locks the run folder. If the block fails, the reason is written to status.json; if a run
    with a result was resumed and no step of it trained, its records become as they were."""
    if overwrite:
        _refuse_inputs_inside(session, path)
    open_new = partial(RunFolder.open_new, overwrite=overwrite)
    open_folder = RunFolder.open_resume if resume else open_new
    session.folder = session.devices.on_main(lambda: open_folder(path, warn=session.console.warn))
    records: dict[str, bytes] = {}

    def leave(exit_code: int, reason: str) -> None:
        _leave_status(session.folder, exit_code, reason, {} if session.limit.has_trained else records)

    if session.devices.peers is not None:
        session.devices.peers.at_loss = lambda error: leave(error.exit_code, str(error))
    try:
        if session.folder is not None and find_result(path) is not None:
            records |= {name: (path / name).read_bytes() for name in RECORDS if (path / name).is_file()}
        check_folder_is_shared(session, path)
        yield
    except BaseException as caught:
        error = session.out_of_memory() if is_out_of_memory(caught) else session.devices.cause(caught)
        if is_out_of_memory(caught):
            leave(ResourceError.exit_code, "out of memory")
        elif isinstance(error, Stopped):
            leave(error.exit_code, error.problems[0].what)
        elif isinstance(error, TunekitError):
            leave(error.exit_code, str(error))
        else:
            leave(130 if isinstance(error, KeyboardInterrupt) else 1, type(error).__name__)
        if error is caught:
            raise
        raise error from caught
    finally:
        if session.folder is not None:
            session.folder.close()


def _refuse_inputs_inside(session: Session, path: Path) -> None:
    """Raises: RunFolderError if the run would read files that --overwrite moves away."""
    values = flat_values(session.loaded.recipe.model_dump(mode="json", exclude={"output"}))
    inputs = [(key, value) for key, value in values if isinstance(value, str) and path in Path(value).parents]
    if inputs:
        key, value = inputs[0]
        what = f"--overwrite would move {value}, which the run reads"
        raise RunFolderError(what, "choose another output.dir", file=str(session.loaded.path), key=key)


def _leave_status(folder: RunFolder | None, exit_code: int, reason: str, records: Mapping[str, bytes]) -> None:
    """Write status.json, or write `records` back, if possible. A failure is only a warning, because the original error
    matters more."""
    if folder is not None:
        try:
            for name, data in records.items():
                folder.write_bytes(name, data)
            if not records:
                folder.status(exit_code, reason)
        except TunekitError as error:
            folder.warn(f"status.json could not be written: {error}")


def read_checkpoint(session: Session, resume: bool) -> Checkpoint | None:
    """The newest complete checkpoint, which a resumed run continues; None for a new run, or if there is none yet. Also
    set the number of threads to the number in the checkpoint, because the order of sums depends on it."""
    checkpoint = session.from_folder(load_newest) if resume else None
    if checkpoint is not None:
        torch.set_num_threads(int(checkpoint.facts["threads"]))
    elif resume:
        session.console.info(f"{session.loaded.recipe.output.dir} has no checkpoint; the run starts from the beginning")
    return checkpoint


def is_run_finished(session: Session) -> bool:
    """Whether the run of this recipe in output.dir is finished and has its result, which a resume otherwise writes
    again. Raises: RunFolderError if a finished run in output.dir has a different recipe."""
    path = Path(session.loaded.recipe.output.dir)
    if not is_finished(path) or find_result(path) is None:
        return False
    refuse_changed_recipe(session)
    return True


def refuse_changed_recipe(session: Session) -> None:
    """Raises: RunFolderError if the run in output.dir has a different recipe."""
    path, recipe = Path(session.loaded.recipe.output.dir), session.loaded.recipe.model_dump(mode="json")
    old = (read_json(path / "environment.json") or {}).get("fingerprint") or {}
    if "recipe" in old:
        same = {**old, "recipe": recipe_values(recipe)}
        require_same(old, same, lines=session.loaded.lines, file=str(session.loaded.path))


def previous_execution(session: Session) -> ExecutionSettings | None:
    """The settings in the plan of the run in this folder. A resumed run uses them again, so that its micro-batches are
    the same even if a different amount of memory is free."""
    return session.from_folder(lambda folder: execution_in(folder.path))


def execution_in(path: Path) -> ExecutionSettings | None:
    """The settings in the plan of a run folder; None if there is no plan.

    Raises: RunFolderError if an older version trained the run with compiled layers.
    """
    plan = read_json(path / "plan.json")
    execution = plan.get("choice") if isinstance(plan, dict) else None
    if execution is not None and execution.pop("compiled", False):
        what = "the run was trained with compiled layers (training.compile), which were removed and rounded differently"
        raise RunFolderError(what, "start a new run in another output.dir", file=str(path / "plan.json"))
    return None if execution is None else ExecutionSettings(**execution)


def check_fingerprint(
    session: Session, planned: Planned, code: Mapping[str, str], checkpoint: Checkpoint | None
) -> JsonObject:
    """Make the fingerprint of this run, and compare it with the fingerprint of the run in this folder or of
    `checkpoint`. `code`: as for make_fingerprint.

    Raises: RunFolderError with each difference of recipe, data, base or version.
    """
    names, on_cpu = accelerator_names(), session.devices.device.type == "cpu"
    new = make_fingerprint(
        session.loaded.recipe.model_dump(mode="json"),
        data=planned.rows.fingerprint,
        base=base_fingerprint(planned.model),
        versions=library_versions(),
        device=session.devices.device.type,
        dtype=str(resolve_dtype(session.loaded.recipe.model, session.devices.device)).removeprefix("torch."),
        accelerator=None if on_cpu else names[0],
        threads=torch.get_num_threads(),
        code=code,
        packages=planned.kernel_packages,
    )
    old = session.from_folder(_previous_fingerprint) if checkpoint is None else checkpoint.facts["fingerprint"]
    check_fingerprints(session, new)
    if old is not None:
        _require_same(session, old, new)
        for note in resume_notes(old, new):
            session.console.warn(note)
    if checkpoint is not None:  # the process that wrote it may have been killed before it removed older checkpoints
        protected = protected_steps(session, checkpoint.facts["loop"]["best_step"])
        keep = session.loaded.recipe.training.keep_checkpoints
        session.in_folder(lambda folder: rotate(folder, checkpoint.step, keep=keep, protect=protected))
    return new


def with_files(
    session: Session, fingerprint: JsonObject, files: Mapping[str, str], checkpoint: Checkpoint | None
) -> JsonObject:
    """Add `files` to the fingerprint: the sha256, by key, of files that the objective read before the first step; and
    the sha256 of the adapter that the recipe continues.

    Raises: RunFolderError if the checkpoint that is resumed has different values.
    """
    if (start := session.loaded.recipe.adapter.init_from) is not None:
        files = {**files, **_continued_adapter(start, checkpoint)}
    if not files:
        return fingerprint
    new = {**fingerprint, "files": dict(files)}
    if checkpoint is not None:
        _require_same(session, checkpoint.facts["fingerprint"], new)
    return new


def _continued_adapter(start: str, checkpoint: Checkpoint | None) -> dict[str, str]:
    """The sha256 of the adapter in the folder `start`. A resume needs no such folder: if it is gone, and the recipe
    still names it, the checkpoint's sha256 is kept. Raises: AdapterError for another folder without an adapter."""
    key, file = "adapter.init_from", Path(start) / TENSORS_NAME
    kept = {} if checkpoint is None else checkpoint.facts["fingerprint"]
    if not file.exists() and kept.get("recipe", {}).get(key) == start and key in kept.get("files", {}):
        return {key: kept["files"][key]}
    return {key: sha256_of(file)}


def _require_same(session: Session, old: JsonObject, new: JsonObject) -> None:
    """Raises: RunFolderError if two fingerprints differ. Differences that --accept-changed allows are recorded for the
    report instead."""
    keys = list(dict.fromkeys([*new.get("code", ()), *new.get("files", ()), *old.get("files", ())]))
    for name in session.accepted:
        if not any(f"{key}.".startswith(f"{name}.") for key in keys):
            what = f"--accept-changed {name}: this run has no file under this key"
            raise RunFolderError(what, f"name one of: {', '.join(keys)}" if keys else "remove it")
    lines, file = session.loaded.lines, str(session.loaded.path)
    for key in require_same(old, new, lines=lines, file=file, accepted=session.accepted):
        if key not in session.changed:
            session.changed.append(key)


def protected_steps(session: Session, best_step: int | None) -> set[int]:
    """The steps whose checkpoints must not be deleted: the best step, if evaluation.best is set."""
    return {best_step} if session.loaded.recipe.evaluation.best and best_step is not None else set()


def _previous_fingerprint(folder: RunFolder) -> JsonObject | None:
    """The fingerprint in environment.json of the run in this folder; None if there is no run."""
    environment = folder.read_json("environment.json") if (folder.path / "plan.json").exists() else None
    return None if environment is None else environment.get("fingerprint")


def folder_bytes(session: Session, plan: Plan, planned: Planned) -> int:
    """The bytes of the adapter and of training.keep_checkpoints + 1 checkpoints: an old checkpoint is deleted only
    after a new one is complete."""
    of_checkpoint = OPTIMIZER_COPIES + needs_reference_state(planned.rows.objective, planned.adapter)
    copies = of_checkpoint * (session.loaded.recipe.training.keep_checkpoints + 1) + 1
    return plan.trainable_parameters * torch.float32.itemsize * copies


def write_plan(session: Session, plan: Plan, state: LoopState | None, fingerprint: JsonObject) -> None:
    """Write the recipe, environment and plan to the run folder. `state`: of a resumed run. Then also remove the metrics
    records that this state does not contain, and state where earlier steps were computed."""

    def write(folder: RunFolder) -> None:
        old = Values((folder.read_json("environment.json") or {}) if state else {})
        folder.write_text("recipe.yaml", dump_recipe(session.loaded.recipe, relative_to=folder.path))
        more = {"processes": session.devices.world, "fingerprint": fingerprint}
        environment = read_environment(device=str(session.devices.device), more=more)
        places, now = [*old.parts("earlier"), *([_place(old)] if old else [])], _place(Values(environment))
        environment["earlier"] = [each for number, each in enumerate(places) if each not in [now, *places[:number]]]
        if old and (before := old.count("processes")) != session.devices.world:
            what = f"number of processes: was {before}, is {session.devices.world}"
            session.console.info(f"{what}; the last digits of results may differ")
        folder.write_json("environment.json", environment)
        if state is not None:  # the resumed state may not know the last evaluation
            rows = folder.read_json(ROWS_NAME) or {}
            if rows.get("step", 0) > state.evaluated_step and rows.get(EARLIER_ROWS):
                folder.write_json(ROWS_NAME, rows[EARLIER_ROWS])
        folder.truncate_metrics(*((state.step, state.evaluated_step) if state else (-1, -1)))
        folder.write_json("plan.json", asdict(plan))

    session.in_folder(write)


def _place(environment: Values) -> dict[str, object]:
    """The number of processes and the processor of a run: the bits of results depend on them."""
    processor = environment.part("fingerprint").get("accelerator") or environment.get("cpu")
    return {"processes": environment.count("processes"), "processor": processor}


def restore_end(session: Session, state: LoopState) -> None:
    """Take from the report of the run's earlier end what was measured after its checkpoint: the seconds of the export
    and of the tasks, and the minutes of the earlier starts."""
    report = Values((None if session.folder is None else session.folder.read_json("report.json")) or {})
    seconds, starts = report.numbers("seconds"), [dict(each) for each in report.parts("starts")]
    state.longest = {part: seconds[part] for part in ("export", "tasks") if part in seconds} | state.longest
    if state.step:
        state.starts[: len(starts)] = starts


def forget_lost_best(session: Session, state: LoopState) -> None:
    """Forget the best step if its checkpoint was deleted: the end of the run could not export it."""
    step = state.best_step
    if not session.loaded.recipe.evaluation.best or step is None or step == state.step:
        return
    if not session.from_folder(lambda folder: (folder.checkpoints / f"step-{step:06d}").is_dir()):
        state.best_step = state.best_value = None
        what = f"the checkpoint of the best step, {step}, was deleted"
        session.console.warn(f"{what}; the result will be the best step of the evaluations that follow")


def remove_records_of_result(folder: RunFolder) -> None:
    """Remove the task scores and the list of exports of an earlier result, which would seem to be those of the next."""
    for name in (TASKS_NAME, EXPORTS):
        if (folder.path / name).is_file():
            unlink(folder.path / name)


def make_trackers(session: Session, step: int) -> Trackers:
    """Start the recipe's experiment trackers. They record steps after `step`. Only the main rank has trackers."""
    recipe = session.loaded.recipe
    names = recipe.output.report_to if session.folder is not None else ()
    path = Path(recipe.output.dir)
    values = recipe_values(recipe.model_dump(mode="json"))
    return Trackers(names, TrackedRun(path.name, path / "tracking", values, step), session.console.warn)


def tracked_numbers(value: StepRecord | EvaluationRecord) -> dict[str, float]:
    """The numbers of a record that trackers receive."""
    if isinstance(value, EvaluationRecord):
        return {f"eval/{name}": number for name, number in value.metrics.items()}
    numbers = {"loss": value.loss, "learning_rate": value.learning_rate, "grad_norm": value.grad_norm}
    return {**numbers, "tokens_per_second": value.tokens_per_second, **value.metrics}


def write_rows(
    folder: RunFolder, row_losses: RowLosses, step: int, evaluation: Evaluation, *, ended_by_time: bool = False
) -> None:
    """Write the loss of each evaluation row. `ended_by_time`: keep the earlier losses in the file, because a resumed
    run does not know this evaluation."""
    earlier = folder.read_json(ROWS_NAME) if step else None
    values = row_losses.values(step, evaluation.sums, evaluation.row_metrics, earlier)
    folder.write_json(ROWS_NAME, values | ({EARLIER_ROWS: earlier} if ended_by_time else {}))


def write_pictures(folder: RunFolder, step: int, evaluation: Evaluation) -> None:
    """Write the images that an evaluation generated."""
    for number, pixels in enumerate(evaluation.pictures or ()):
        folder.write_bytes(picture_name(step, number), png_bytes(pixels))
