"""`tunekit data check`: reports suspicious rows of a recipe's data, with their line numbers, before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.artifacts.report.next_step import after_data_check
from tunekit.console import Console
from tunekit.data.looking.look import ERRORS, EXCESS, KINDS, LENGTHS, Found, add_other_scripts, look_at_rows
from tunekit.data.looking.rows_file import RowsToWrite, refuse_rows_file, write_rows_file
from tunekit.data.looking.similar import NEAR_DUPLICATES, SimilarityIndex, finds_near_duplicates
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.errors import InputError, TunekitError, listed
from tunekit.files.durable import json_result
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.recipe import Recipe

if TYPE_CHECKING:  # the module imports torch
    from tunekit.contracts import RowKind

SHOWN_ROWS = 8


def data_check_verb(
    loaded: LoadedRecipe, fix: str | None, json_file: str | None, *, overwrite: bool = False, strict: bool = False
) -> int:
    """Check all rows; returns 2 if there are errors. `strict`: also if there are warnings. Raises: TunekitError if the
    rows cannot be read."""
    refuse_to_replace("--json", json_file, loaded)
    if fix is not None:
        refuse_rows_file("--fix", fix, loaded, overwrite)
    elif overwrite:
        raise InputError("--overwrite replaces the file of --fix, but --fix is missing", "add --fix FILE")
    recipe, console, write_result = loaded.recipe, Console(json_file=json_file), json_result(json_file)
    console.info(*loaded.rewrites)
    if not finds_near_duplicates():
        console.info(f"near duplicates are not looked for, because rensa is not installed: {NEAR_DUPLICATES}")
    evaluation = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
    example, data, limit = recipe.objective.example, recipe.data, recipe.data.max_length
    names = _names((*data.train, *evaluation))
    kind, lengths = _row_kind(recipe)
    console.info(*lengths)
    train_index, eval_index = SimilarityIndex(), SimilarityIndex()
    eval_findings = [
        look_at_rows(source, names[source.path], example, data, eval_index, None, False, kind) for source in evaluation
    ]
    known, keep = eval_index if eval_findings and not recipe.objective.measures_training else None, fix is not None
    trained = [
        look_at_rows(source, names[source.path], example, data, train_index, known, keep, kind) for source in data.train
    ]
    for each in (*trained, *eval_findings):
        add_other_scripts(each)
        console.info(f"{each.name}: {each.rows:,} rows")
        if each.sizes and recipe.objective.medium is None:
            console.table(["tokens (maximum)" if kind is None else "tokens", "rows", ""], _histogram(each, limit))
        if not each.lines:
            console.info("no findings")
            continue
        lines = ((kind, each.lines[kind]) for kind in KINDS if kind in each.lines)
        rows = [[KINDS[kind], len(found), _rows_text(each, found), each.first[kind]] for kind, found in lines]
        console.table(["finding", "rows", "at line", "the first"], rows)
    fixes = fix is None and any(each.left_out for each in trained)
    if fix is not None:
        _write_fixed(fix, trained, data, console)
    files = (*trained, *eval_findings)
    remaining = [each.left_out for each in (files if fix is None else eval_findings)]
    if fix is None or any(remaining):  # else the note about FILE says what to do
        console.next_steps(after_data_check(remaining, loaded.path, overrides=loaded.overrides, fixes=fixes))
    findings = [{"file": each.name, "rows": each.rows, "findings": _places(each)} for each in files]
    write_result({"files": findings, "fixed": fix})
    errors = (*ERRORS, *(["long"] if data.excess_length == "error" else []))
    wrong = [kind for each in files for kind in each.left_out if strict or kind in errors]
    if not wrong and any(each.left_out for each in files):
        console.info("these findings are warnings; with --strict, the exit code is 2")
    return 2 if wrong else 0


def _names(sources: Sequence[Source]) -> dict[str, str]:
    """For each path, the name of its file; the whole path if files in different folders have this name."""
    names = {source.path: Path(source.path).name for source in sources}
    counts = Counter(names.values())
    return {path: name if counts[name] == 1 else path for path, name in names.items()}


def _write_fixed(fix: str, trained: Sequence[Found], data: DataSection, console: Console) -> None:
    """Write the rows without findings, and print how to train on them. Raises: InputError if one JSONL file cannot
    contain them."""
    pairs = zip(trained, data.train, strict=True)
    parts = [RowsToWrite(each.name, each.format, source, each.passed) for each, source in pairs]
    use, *notes = write_rows_file("--fix", fix, parts)
    if any("long" in each.kept & each.lines.keys() for each in trained):
        notes.append(f"rows longer than data.max_length are in it too, because they are {EXCESS[data.excess_length]}")
    console.info(f"{fix}: {sum(len(part.rows) for part in parts):,} training rows without findings; {use}", *notes)


def _row_kind(recipe: Recipe) -> tuple[RowKind | None, list[str]]:
    """The row kind, and a note about how tokens are counted. The row kind is None if the model's tokenizer is not on
    this machine."""
    from tunekit.planning.prepare import row_kind_at_hand

    name, why = recipe.model.name_or_path, "is not on this machine yet"
    try:
        kind = row_kind_at_hand(recipe)
    except TunekitError as error:
        kind, why = None, f"cannot be used: {error.problems[0].what}"
    if recipe.objective.medium is not None:
        return kind, [] if kind is not None else [f"{name} {why}, so rows that training would drop are not reported"]
    if kind is None:
        return None, [f"the tokenizer of {name} {why}; the number of tokens is estimated from the script of the text"]
    return kind, [f"tokens are counted with the tokenizer of {name}, including its chat template"]


def _rows_text(findings: Found, lines: Sequence[int]) -> str:
    """The first line numbers, as text."""
    shown = findings.place if findings.files else "{:,}".format
    return listed([shown(line) for line in sorted(set(lines))], SHOWN_ROWS)


def _places(findings: Found) -> dict[str, list[int] | list[str]]:
    """The lines of each kind of finding; with several files, the files and lines."""
    if not findings.files:
        return dict(findings.lines)
    return {kind: [findings.place(line) for line in lines] for kind, lines in findings.lines.items()}


def _histogram(findings: Found, limit: int) -> Iterator[list[object]]:
    """A histogram of lengths as rows of a table: a range of lengths, the number of data rows in it, a bar, and a mark
    for lengths over max_length."""
    most = max(findings.sizes.values(), default=1)
    for low, high in zip(LENGTHS, [*LENGTHS[1:], None], strict=True):
        if findings.sizes[low]:
            end = "and more" if high is None else f"to {high - 1:,}"
            mark = "  over data.max_length" if low >= limit else ""
            yield [f"{low:,} {end}", findings.sizes[low], "#" * max(1, round(30 * findings.sizes[low] / most)) + mark]
