"""The commands that show or check runs (report, runs, watch, audit) and this machine or a model folder (doctor)."""

from typing import Annotated

import typer

from tunekit.commands.options import AllowCode, Device, JsonFile

app = typer.Typer(rich_markup_mode=None)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of runs")],
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="write a page that compares the runs; for one run, its report page"),
    ] = None,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="write the results as a table")] = None,
    json_file: JsonFile = None,
) -> int:
    """Compare runs: differing keys, results, curves. With one run, write its report page again."""
    from tunekit.report import report_verb

    return report_verb(runs, html, json_file, csv)


@app.command()
def runs(
    words: Annotated[list[str] | None, typer.Argument(metavar="[clean] [DIR]", help="default: runs")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="with clean: do not ask for confirmation")] = False,
    json_file: JsonFile = None,
) -> None:
    """List runs, or free disk space (clean). clean lists the checkpoints that are not needed, then removes them."""
    clean = (words or [])[:1] == ["clean"]
    folders = (words or [])[int(clean) :]
    if len(folders) > 1 or (yes and not clean) or (json_file and clean):
        raise typer.BadParameter("write tunekit runs [DIR] [--json FILE], or tunekit runs clean [DIR] [--yes]")
    folder = folders[0] if folders else "runs"
    from tunekit.runs import clean_verb, runs_verb

    if clean:
        clean_verb(folder, yes)
    else:
        runs_verb(folder, json_file)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run")],
    port: Annotated[
        int | None,
        typer.Option("--serve", metavar="PORT", min=0, max=65535, help="show a page in a browser on this machine"),
    ] = None,
) -> None:
    """Show the progress of a running training, here or in a browser."""
    from tunekit.watch import watch_verb

    watch_verb(run, port)


@app.command()
def audit(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run")],
    parts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="compute only N parts of the run again, which --seed selects; default: the whole run",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="the seed that selects the parts; default: 0")
    ] = None,
    allow_code: AllowCode = False,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Prove a run: compute its steps again, and compare every byte."""
    from tunekit.audit import audit_verb

    audit_verb(run, parts, seed, json_file, allow_code=allow_code)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="a model folder; doctor states which programs would read it wrongly"),
    ] = None,
    fix: Annotated[
        str | None, typer.Option("--fix", metavar="OUT", help="write a corrected copy of MODEL to this new folder")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="remove tunekit's cache: encoded rows, quantized bases")
    ] = False,
    json_file: JsonFile = None,
) -> int:
    """Check this machine, or a model folder for other programs."""
    if model is None and fix is not None:
        raise typer.BadParameter("write tunekit doctor MODEL --fix OUT")
    if model is not None and clear:
        raise typer.BadParameter("--clear removes the cache, so it takes no MODEL")
    from tunekit.doctor import doctor_verb, model_verb

    if model is not None:
        return model_verb(model, fix, json_file)
    doctor_verb(clear, json_file)
    return 0
