"""`tunekit export`: writes a model or an adapter in the format of another program. It can also compare the program's
results with torch's."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tunekit.arithmetic.normalise import find_plain_target
from tunekit.artifacts.report.values import read_run
from tunekit.artifacts.run import EXPORTS, read_json
from tunekit.console import Console
from tunekit.errors import InputError, Problem
from tunekit.exports.format import Evidence, Exported, Format, Options, load_format
from tunekit.exports.programs.program import find_program
from tunekit.exports.programs.versions import INSTALL
from tunekit.exports.questions import NotComparable, make_questions, row_ids
from tunekit.files.durable import write_json
from tunekit.files.work_folder import new_path, refuse_inside
from tunekit.machine.signals import StopSignals
from tunekit.model.storage.upload import upload_folder
from tunekit.records import bytes_text, with_article
from tunekit.targets.exportable import Exportable, make_exportable

CERTIFICATE = "certificate.json"


def export_verb(
    target: str,
    to: str,
    output: str,
    base: str | None = None,
    options: Options | None = None,
    certify: bool | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Write the export completely or not at all. `certify`: whether to run the program, and compare its results
    with torch's. True: the program must be installed; None: only if the program is installed; False: no.

    Raises: InputError, before anything is written, if the format cannot represent the target.
    """
    console, format, options = Console(), load_format(to), options or Options()
    spec = find_plain_target(target, base, overrides)
    console.info(*spec.rewrites)
    exportable = make_exportable(spec)
    path = Path(os.path.abspath(Path(output).expanduser()))
    _check(to, format, exportable, options, path, certify=bool(certify))
    read = (spec.run, spec.adapter, exportable.folder / (exportable.gguf_file or ""))
    refuse_inside(path, [place for place in read if place is not None])
    run = _run_of(exportable)
    evidence = Evidence(partial(row_ids, exportable, held_out=False), None if run is None else read_run(run), path.name)
    stopped = "while the export was written; the partial export was removed"
    with StopSignals(announce=False) as signals, signals.at_once(stopped), new_path(path) as partial_path:
        written = format.write(exportable, partial_path, evidence, options)
    notes = tuple(note.replace(str(partial_path), shlex.quote(str(path))) for note in written.notes)
    written = Exported(path, written.what, notes)
    size = sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
    console.info(f"written to {path} ({bytes_text(size)})", *written.notes)
    if options.push:
        console.info(f"uploaded to {upload_folder(path, path.name)}")
    if certify is not False and format.PROGRAM:
        with (
            StopSignals(announce=False) as signals,
            signals.at_once(f"before the export was certified; {path} is complete"),
        ):
            _certify(to, format, written, exportable, options, required=bool(certify))


def _run_of(exportable: Exportable) -> Path | None:
    """The run whose final result is exported. None for a checkpoint, because the run's report describes other
    weights."""
    return None if exportable.target.kind == "checkpoint" else exportable.target.run


def _check(to: str, format: Format, exportable: Exportable, options: Options, path: Path, *, certify: bool) -> None:
    """Raises: InputError with all problems that prevent this export."""
    if exportable.kind not in format.TAKES:
        takes = " or ".join(map(with_article, sorted(format.TAKES)))
        what = f"{to} takes {takes}, and the target is {with_article(exportable.kind)}"
        how = "choose another --to"
        if exportable.kind == "model" and "adapter" in format.TAKES:
            command = f"tunekit doctor {shlex.quote(str(exportable.folder))}"
            how = f"other programs read the model's folder itself; check the folder with: {command}"
        raise InputError(what, how, key="--to")
    wrong = [
        Problem(f"{to} does not read --{name}", f"leave --{name} out", key=f"--{name}")
        for name in options.given()
        if name not in format.OPTIONS
    ]
    if options.merged and "adapter" not in exportable.kind:
        wrong.append(Problem("there is no adapter to merge", "leave --merged out", key="--merged"))
    if certify and not format.PROGRAM:
        wrong.append(Problem(f"no program certifies {to}", "leave --certify out", key="--certify"))
    elif certify and find_program(format.PROGRAM) is None:
        how = f"install it with: {INSTALL} {format.PROGRAM}"
        wrong.append(Problem(f"{format.PROGRAM} is not installed", how, key="--certify"))
    if os.path.lexists(path):
        wrong.append(Problem(f"{path} exists", "choose another --output", key="--output"))
    if format.SUFFIX and path.suffix != format.SUFFIX:
        wrong.append(Problem(f"{path} does not end in {format.SUFFIX}", "choose another --output", key="--output"))
    wrong += format.problems(exportable, options)
    if wrong:
        raise InputError.of(wrong)


def _certify(
    to: str, format: Format, written: Exported, exportable: Exportable, options: Options, *, required: bool
) -> None:
    """Run the program on the export, compare its results with torch's, and print and save the differences. If the
    comparison is impossible, this is an error if `required`, else a note.

    Raises: InputError if the program cannot read the export.
    """
    console, program = Console(), find_program(format.PROGRAM)
    if program is None:
        console.info(f"not certified: {format.PROGRAM} is not installed ({INSTALL} {format.PROGRAM})")
        return
    adapter = written.what == "adapter"  # vLLM computes each beginning of a row again
    questions = partial(make_questions, exportable, with_base=adapter, past_window=not (adapter and to == "vllm"))
    try:
        certificate = format.certify(written, exportable, program, questions, options)
    except NotComparable as reason:
        if required:
            raise
        console.info(f"not certified: {reason.problems[0].what}")
        return
    except InputError as error:
        raise InputError(f"the export is written, but {error.problems[0].what}", error.problems[0].how) from error
    console.table(
        ["computed by the program", "largest", "mean", "perplexity", "in torch", "greedy tokens that differ"],
        [
            [name, part.largest, part.mean, part.perplexity, part.torch_perplexity, part.greedy_differences]
            for name, part in certificate.parts.items()
        ],
        title=f"{certificate.program} {certificate.version} and torch: log-probabilities of {certificate.rows}",
    )
    if certificate.note:
        console.info(certificate.note)
    if certificate.warning:
        console.warn(certificate.warning)
    facts = {"format": to, "path": written.path.name, "what": written.what, "options": asdict(options)}
    result = facts | {"certificate": asdict(certificate)}
    beside = written.path / CERTIFICATE if written.path.is_dir() else Path(f"{written.path}.{CERTIFICATE}")
    write_json(beside, result)
    if (run := _run_of(exportable)) is not None:
        write_json(run / EXPORTS, [*(read_json(run / EXPORTS) or ()), result])
