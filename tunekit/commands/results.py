"""The commands that read what is there: report, runs and watch; doctor, which reads the machine."""

from typing import Annotated

import typer

from tunekit.commands.options import JsonFile

app = typer.Typer(rich_markup_mode=None)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of runs")],
    html: Annotated[str | None, typer.Option(metavar="FILE", help="a page of them; of one run: its own")] = None,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="what came of each, as a table")] = None,
    json_file: JsonFile = None,
) -> int:
    """Compare runs, or write the page of one anew. What differs, what came of each, their curves."""
    from tunekit.report import report_verb

    return report_verb(runs, html, json_file, csv)


@app.command()
def runs(
    words: Annotated[list[str] | None, typer.Argument(metavar="[clean] [DIR]", help="default: runs")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="of clean: do not ask")] = False,
    json_file: JsonFile = None,
) -> None:
    """List runs, or free their disk (clean). It removes checkpoints that are not needed, after showing them."""
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
        int | None, typer.Option("--serve", metavar="PORT", min=0, max=65535, help="its page, on this machine")
    ] = None,
) -> None:
    """Follow a run of another terminal. Its progress here, or its page in a browser."""
    from tunekit.watch import watch_verb

    watch_verb(run, port)


@app.command()
def doctor(
    clear: Annotated[bool, typer.Option("--clear", help="remove tunekit's cache: rows, packed bases")] = False,
    json_file: JsonFile = None,
) -> None:
    """Show versions, machine, caches, and what is missing. What for, and the command that mends it."""
    from tunekit.doctor import doctor_verb

    doctor_verb(clear, json_file)
