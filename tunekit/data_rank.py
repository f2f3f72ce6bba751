"""`tunekit data rank`: ranks the training rows of a finished run by what its checkpoints show about each of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunekit.artifacts.fingerprint import changed_files
from tunekit.artifacts.report.rank_page import rank_page, rows_count
from tunekit.artifacts.report.values import RunValues, read_run
from tunekit.artifacts.run import RANK_NAME, refuse_to_replace_part
from tunekit.artifacts.stopped import refuse_running
from tunekit.companions.base import load_companions, make_companions
from tunekit.console import Console
from tunekit.console.progress import CountProgress
from tunekit.console.text import time_text
from tunekit.contracts import Progress
from tunekit.data.looking.rows_file import (
    SourceRow,
    refuse_rows_file,
    rows_text,
    source_rows,
    training_rows,
    write_rows_file,
)
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.data.rows import RowSet, load_rows
from tunekit.errors import AdapterError, InputError, ModelError
from tunekit.evaluation.row_listing import Ranking
from tunekit.evaluation.row_ranking import (
    SUSPICIOUS,
    WRONG,
    Neighbours,
    RowFacts,
    contradicted,
    has_classes,
    leave_out,
    nearest,
    rank_correlation,
)
from tunekit.evaluation.row_states import RowReader, RowValues
from tunekit.files.durable import json_result, try_to_write, write_text
from tunekit.machine.devices import Devices, make_devices
from tunekit.objectives.base import make_objective
from tunekit.recipe.load import LoadedRecipe, load_recipe
from tunekit.targets.export import refuse_code
from tunekit.targets.labels import start_facts
from tunekit.targets.states import (
    BASE_BACK,
    RunState,
    checkpoint_steps,
    keep_step_0,
    knows_step_0,
    load_states,
    refuse_damaged_states,
)
from tunekit.targets.target import TargetSpec, find_target, processor_of
from tunekit.training.influence import influence_of, make_projection, row_gradients, state_weights

SHOWN_ROWS = 4  # rows of a list in the terminal
FEW_STATES = 3  # with fewer states, losses over the checkpoints say little
BACKWARD = 2.0  # CPU time of a backward pass, in forwards
CORRELATION = "(1: the same order of rows, 0: no relation)"


def data_rank_verb(
    run: str,
    keep: float | None,
    output: str | None,
    influence: bool,
    json_file: str | None,
    *,
    allow_code: bool = False,
) -> None:
    """Rank the training rows of a run, write the page, and with `keep` write the rows to keep.

    Raises: InputError if the run, its data or an option does not allow it; RunFolderError for a damaged checkpoint.
    """
    if (keep is None) != (output is None):
        raise InputError("--keep and --output need each other", "write, for example, --keep 0.8 --output kept.jsonl")
    if output is not None and json_file is not None and Path(output).resolve() == Path(json_file).resolve():
        raise InputError(f"--output and --json both name {output}", "name two files")
    path = Path(run)
    values, loaded = read_run(path), load_recipe(path / "recipe.yaml")
    if not allow_code:
        refuse_code(path, loaded.recipe.model_dump(serialize_as_any=True))
    refuse_to_replace("--json", json_file, loaded)
    refuse_to_replace_part("--json", json_file, path)
    if output is not None:
        refuse_rows_file("--output", output, loaded, None)
    for file in (path / RANK_NAME, *([] if output is None else [Path(output)])):
        try_to_write(file)  # before hours of work
    write_result, console, devices = json_result(json_file), Console(json_file=json_file), make_devices()
    refuse_running(path, "rank its rows when the run has ended")
    with _base_in_its_place():
        target = find_target(run, None, [], allow_code=True)
    console.info(*target.notes)
    refuse_damaged_states(target)
    rows = _run_rows(values, loaded, target)
    if keep is not None and output is not None:
        _refuse_keep(rows, loaded, keep, output)
    if influence:
        _refuse_influence(target, rows)
    console.info(*_costs(values, target, rows, influence))
    ranking = _measure(values, target, rows, devices, console, influence)
    notes = _reliability(ranking)
    console.info(*notes)
    _print(console, ranking)
    result = ranking.json() | {"run": str(path), "notes": notes, "kept": None}
    try:
        write_text(path / RANK_NAME, rank_page(values.name, notes, ranking.pages()))
        console.info(f"page: {path / RANK_NAME}")
        if keep is not None and output is not None:
            result["kept"] = _write_kept(ranking, loaded, keep, output, console)
        else:
            command = f"tunekit data rank {shlex.quote(run)} --keep 0.8 --output kept.jsonl"
            read = f"read the rows in {RANK_NAME} and correct wrong ones"
            console.next_steps([f"{read}; if many are wrong, leave a fifth out: {command}"])
    finally:  # a full disk does not discard what was measured
        write_result(result)


@contextmanager
def _base_in_its_place() -> Iterator[None]:
    """A block whose errors about the run's base do not advise the option --base, which `data rank` does not have."""
    try:
        yield
    except (ModelError, AdapterError) as error:
        problems = [replace(each, how=BASE_BACK) if "--base" in each.how else each for each in error.problems]
        raise type(error).of(problems, error.notes) from error


def _run_rows(values: RunValues, loaded: LoadedRecipe, target: TargetSpec) -> RowSet:
    """The rows of the run. Raises: InputError if they or a companion (a teacher) have changed since the run,
    or if they were streamed."""
    recipe = loaded.recipe
    objective = make_objective(recipe.objective, processor_of(target), start_facts(recipe))
    rows = load_rows(recipe.data, objective, seed=recipe.training.seed)
    if rows.streams:
        what = "the run's rows were streamed, so they have no fixed numbers to rank"
        raise InputError(what, "rank a run without data.train[].streaming")
    then = values.environment.part("fingerprint")
    companions = make_companions(rows.objective.companions).values()
    code = {key: digest for companion in companions for key, digest in companion.fingerprint().items()}
    for key in changed_files(then, {"code": then.part("code") | code}):
        what = f"{key}: its files have changed since the run"
        raise InputError(what, "restore the files, or train again and rank the new run")
    if then.get("data") != rows.fingerprint:
        what = "the rows have changed since the run: their fingerprint differs from the one in environment.json"
        raise InputError(what, "restore the files, or train again and rank the new run")
    return rows


def _refuse_keep(rows: RowSet, loaded: LoadedRecipe, keep: float, output: str) -> None:
    """Raises: InputError if no row would be left, or if one JSONL file cannot contain the rows. This is checked before
    hours of work."""
    total = len(set(source_rows(rows)))
    if not round(keep * total):
        raise InputError(f"--keep {keep:g} leaves none of {total:,} training rows", "write a larger share")
    rows_text("--output", output, list(training_rows(rows, loaded.recipe.data.train)))


def _refuse_influence(target: TargetSpec, rows: RowSet) -> None:
    """Raises: InputError if the influence of rows cannot be measured."""
    if rows.evaluation is None:
        what = "--influence estimates the influence on evaluation rows, but the run has none"
        raise InputError(what, "leave --influence out: the other lists need no evaluation rows")
    if target.recipe is not None and target.recipe.adapter.trains_base:
        what = "--influence reads the gradients of an adapter, but the run trained the whole model"
        raise InputError(what, "leave --influence out: the other lists need no gradients")


def _costs(values: RunValues, target: TargetSpec, rows: RowSet, influence: bool) -> list[str]:
    """What the ranking will compute, and about how long it takes at the run's own speed."""
    steps, knows_before = checkpoint_steps(target), knows_step_0(target)
    states = max(len(steps), 1) + knows_before
    speed, forwards = values.report.number("tokens_per_second"), states * len(rows.train)
    tokens = int(rows.train.lengths.sum()) * states / (1 + BACKWARD)  # as if trained on
    checkpoints = "1 checkpoint" if len(steps) == 1 else f"{len(steps)} checkpoints"
    of_states = checkpoints if steps else "the result"
    before = ", and before training" if knows_before else ""
    work = f"{forwards:,} forwards"
    if influence:
        rates = _rates(values)
        used = sum(rates.get(step, 0.0) > 0 for step in steps) or max(len(steps), 1)
        work += f", and {used * sum(map(len, rows.all)):,} forwards and backwards of one row"
        tokens += used * sum(int(some.lengths.sum()) for some in rows.all)
    about = f", about {time_text(tokens / speed)} at the run's own speed" if speed else ""
    lines = [f"{rows_count(len(rows.train))} at {of_states}{before}: {work}{about}"]
    if not steps:
        lines.append(
            "the run has no checkpoints of an adapter: only its result is used, so losses over the training are "
            "missing; set training.save_steps and training.keep_checkpoints in the next run"
        )
    elif len(steps) < FEW_STATES:
        lines.append(
            f"the run kept only {checkpoints}; more of them (training.keep_checkpoints) show better which "
            "rows are learned late"
        )
    return lines


# --- measuring -----------------------------------------------------------------------------------------------------


def _measure(
    values: RunValues, target: TargetSpec, rows: RowSet, devices: Devices, console: Console, influence: bool
) -> Ranking:
    """Measure all rows in all states of the run."""
    with _base_in_its_place():
        loaded, states = load_states(target, devices.device, _rates(values), rows.objective)
    knows_before = keep_step_0(loaded)
    model = loaded.model
    model.repeats_rows = True  # each state needs the same scores of the reference model
    model.companions = load_companions(rows.objective, devices.device)
    size = target.evaluation.batch_size
    reader = RowReader(model, rows.objective, devices, rows.train, size, CountProgress(console))
    exported = [at for at, state in enumerate(states) if state.step == values.exported_step]
    after = exported[0] if exported else len(states) - 1
    states[0].load()
    if not reader.finds_losses():
        what = (
            f"the loss of the objective {rows.objective.name} is not a sum over training rows, so they cannot be ranked"
        )
        raise InputError(what, "rank the rows of a run with a different objective, such as sft")
    before = reader.read(before=True) if knows_before else None
    read = []
    for state in states:
        state.load()
        read.append(reader.read())
    facts, steps = _facts(rows, before, read, after), [state.step for state in states]
    ranking = Ranking(rows, facts, steps, loaded.processor.tokenizer)
    if not influence:
        return ranking
    measured, agreement, near = _influence(reader, rows, states, CountProgress(console))
    return replace(ranking, facts=replace(facts, influence=measured, near=near), influence_agreement=agreement)


def _influence(
    reader: RowReader, rows: RowSet, states: Sequence[RunState], progress: Progress
) -> tuple[NDArray[np.float64], float | None, Neighbours]:
    """The influence of each row on the evaluation rows, (rows,); the rank correlation of the influences on two halves
    of the evaluation rows, None if there is only one; and the nearest rows by their gradients in the state with the
    highest learning rate."""
    model, held = reader.model, rows.evaluation
    assert model.adapter is not None
    assert held is not None  # _refuse_influence checked both
    projection, weights = make_projection(model.adapter.trained()), state_weights([state.rate for state in states])
    influences, near = np.zeros((3, len(rows.train))), None
    for at in np.argsort(-weights, kind="stable").tolist():
        if not weights[at]:
            continue
        states[at].load()
        train, evaluation = (
            row_gradients(model, replace(reader, rows=some).measured(), some, projection, progress)
            for some in (rows.train, held)
        )
        near = nearest(train, centred=False) if near is None else near
        parts = (evaluation, evaluation[::2], evaluation[1::2] if len(held) > 1 else evaluation)
        influences += weights[at] * np.stack([influence_of(train, part) for part in parts])
    assert near is not None  # the weights add up to 1
    return influences[0], rank_correlation(influences[1], influences[2]) if len(held) > 1 else None, near


def _facts(rows: RowSet, before: RowValues | None, read: Sequence[RowValues], after: int) -> RowFacts:
    """The facts of all rows, from their values in each state."""
    margins, labels = [each.margins for each in read if len(each.margins)], _labels(rows)
    near = [(each, _nearest(rows, each)) for each in (*([] if before is None else [before]), *read)]
    return RowFacts(
        before=np.zeros(0) if before is None else before.losses,
        losses=np.stack([each.losses for each in read]),
        margins=np.stack(margins) if margins else np.zeros((0, 0)),
        after=after,
        disagreement=np.mean([contradicted(each.losses, there, labels) for each, there in near], axis=0),
        near=near[0][1],
        labels=labels,
    )


def _nearest(rows: RowSet, values: RowValues) -> Neighbours:
    if len(values.hidden) == len(rows.train):
        return nearest(values.hidden)
    return Neighbours(np.zeros((len(rows.train), 0), np.int64), np.zeros((len(rows.train), 0)))


def _labels(rows: RowSet) -> list[str]:
    """The label of each row, or its set of labels; empty if rows have no classes: numbers, or one label for each
    word."""
    objective, train = rows.objective, rows.train
    if objective.answering is None or objective.answering.kind != "label" or not objective.rows.labels.names:
        return []
    names = [objective.rows.labels_of(train[number]) for number in range(len(train))]
    labels, single = [each[0] if len(each) == 1 else str(each) for each in names], bool((train.supervised == 1).all())
    return labels if single and any(names) and len(set(labels)) <= len(labels) // 2 else []


def _rates(values: RunValues) -> dict[int, float]:
    """The learning rate of each step."""
    return {record.count("step"): record.number("learning_rate") or 0.0 for record in values.steps}


# --- results -------------------------------------------------------------------------------------------------------


def _reliability(ranking: Ranking) -> list[str]:
    """How reliable the lists are."""
    facts, notes = ranking.facts, list[str]()
    if len(facts.losses) > 1:
        agreement = rank_correlation(facts.losses[::2].mean(axis=0), facts.losses[1::2].mean(axis=0))
        what = f"the losses of two halves of the checkpoints have a rank correlation of {agreement:.2f}"
        notes.append(f"{what} {CORRELATION}")
    if ranking.influence_agreement is not None:
        what = f"two halves of the evaluation rows give a rank correlation of {ranking.influence_agreement:.2f}"
        notes.append(f"influence: {what} {CORRELATION}")
    if len(set(facts.labels)) == 1:
        label = facts.labels[0]
        notes.append(f"all rows have the label {label}, so margins and similar rows cannot show wrong labels")
    if not has_classes(facts):
        share = f"{SUSPICIOUS:.0%} of the rows with the highest scores"
        notes.append(f"rows have no classes, so '{WRONG}' lists the {share}, also if no row is wrong")
    notes.append("the lists are estimates; the exact effect of a group of rows: tunekit sweep with sweep.leave_out")
    return notes


def _print(console: Console, ranking: Ranking) -> None:
    """Print the first rows of each list. With --quiet too, a table has its list's name."""
    for name, numbers in ranking.lists.items():
        lines = [
            [ranking.places[int(number)], ranking.short_text(int(number)), ranking.why(int(number), name)]
            for number in numbers[:SHOWN_ROWS]
        ]
        if not lines:
            console.info(f"{name}: no rows")
            continue
        console.result(f"{name}: {rows_count(len(numbers))}")
        console.table(["row", "text", "why"], lines)


def _write_kept(ranking: Ranking, loaded: LoadedRecipe, keep: float, output: str, console: Console) -> dict[str, Any]:
    """Write the rows to keep, and print how to train on them. A row that was split is kept or left out as a whole."""
    written = source_rows(ranking.rows)
    total = len(set(written))
    first = dict[SourceRow, str]()  # rows in the order in which they are left out -> their file and line
    for number in leave_out(ranking.facts, ranking.lists).tolist():
        first.setdefault(written[number], ranking.places[number])
    left_out = dict(list(first.items())[: total - round(keep * total)])
    parts = list(training_rows(ranking.rows, loaded.recipe.data.train, left_out))
    use, *notes = write_rows_file("--output", output, parts)
    count = sum(len(part.rows) for part in parts)
    console.info(f"{output}: {count:,} of {total:,} training rows; {use}", *notes)
    listed = {written[number] for numbers in ranking.lists.values() for number in numbers.tolist()}
    if others := sum(each not in listed for each in left_out):
        what = f"{others:,} of the {len(left_out):,} rows left out are in no list"
        console.info(f"{what}: they are the next most suspicious rows, but may be right; a higher --keep keeps them")
    if isinstance(loaded.recipe.data.eval, float):
        console.info(f"the evaluation rows that data.eval split off are not in {output}; name a file in data.eval")
    return {"file": output, "rows": count, "left_out": list(left_out.values())}
