"""`tunekit export`: write a model or an adapter as another program reads it, and ask that program what it computes."""

import os
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
from tunekit.exports.questions import make_questions, row_ids
from tunekit.files.durable import new_path, write_json
from tunekit.machine.signals import StopSignals
from tunekit.model.storage.upload import upload_folder
from tunekit.records import bytes_text
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
    """Write the export completely or not at all. `certify`: True requires the program, None asks it if it is installed.

    Raises: InputError for everything that the format cannot hold, before anything is written.
    """
    console, format, options = Console(), load_format(to), options or Options()
    spec = find_plain_target(target, base, overrides)
    console.info(*spec.rewrites)
    exportable = make_exportable(spec)
    path = Path(os.path.abspath(Path(output).expanduser()))
    _check(to, format, exportable, options, path)
    run = exportable.target.run
    evidence = Evidence(partial(row_ids, exportable), None if run is None else read_run(run), path.name)
    stopped = "in the export; its partial output was removed"
    with StopSignals(announce=False) as signals, signals.at_once(stopped), new_path(path) as partial_path:
        written = format.write(exportable, partial_path, evidence, options)
    notes = tuple(note.replace(str(partial_path), str(path)) for note in written.notes)
    written = Exported(path, written.what, notes)
    size = sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
    console.info(f"written to {path} ({bytes_text(size)})", *written.notes)
    if options.push:
        console.info(f"uploaded to {upload_folder(path, path.name)}")
    if certify is not False and format.PROGRAM:
        with StopSignals(announce=False) as signals, signals.at_once(f"before it was certified; {path} is complete"):
            _certify(to, format, written, exportable, options, required=bool(certify))
    elif certify:
        raise InputError(f"no program certifies {to}; the export is written", "leave --certify out", key="--certify")


def _check(to: str, format: Format, exportable: Exportable, options: Options, path: Path) -> None:
    """Raises: InputError with all problems."""
    if exportable.kind not in format.TAKES:
        takes = " or ".join(f"a {kind}" for kind in sorted(format.TAKES))
        raise InputError(f"{to} takes {takes}, and this is a {exportable.kind}", "choose another --to", key="--to")
    wrong = [
        Problem(f"{to} does not read --{name}", "leave it out", key=f"--{name}")
        for name in options.given()
        if name not in format.OPTIONS
    ]
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
    """Ask the program, print its figures, and write them next to the export.

    Raises: InputError if the program is required and not installed.
    """
    console = Console()
    certificate = format.certify(written, exportable, partial(make_questions, exportable), options)
    if certificate is None:
        what, how = f"{format.PROGRAM} is not installed", f"install it with: scripts/certify {format.PROGRAM}"
        if required:
            raise InputError(f"the export is written, but not certified: {what}", how, key="--certify")
        console.info(f"not certified: {what}; {how}")
        return
    console.table(
        ["computed by the program", "largest", "mean", "perplexity", "torch's", "other greedy tokens"],
        [
            [name, part.largest, part.mean, part.perplexity, part.torch_perplexity, part.greedy_differences]
            for name, part in certificate.parts.items()
        ],
        title=f"{certificate.program} {certificate.version} beside torch: log-probabilities of {certificate.rows}",
    )
    if certificate.note:
        console.info(certificate.note)
    facts = {"format": to, "path": str(written.path), "what": written.what, "options": asdict(options)}
    result = facts | {"certificate": asdict(certificate)}
    beside = written.path / CERTIFICATE if written.path.is_dir() else Path(f"{written.path}.{CERTIFICATE}")
    write_json(beside, result)
    if (run := exportable.target.run) is not None:
        write_json(run / EXPORTS, [*(read_json(run / EXPORTS) or ()), result])
