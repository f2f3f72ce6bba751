"""The commands that look at rows: data check."""

from __future__ import annotations

from typing import Annotated

import typer

from tunekit.commands.options import Call, JsonFile, Overrides, RecipeFile


def add_rows(app: typer.Typer, call: Call) -> None:
    """Add them to the program."""
    data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(data, name="data")

    @data.callback()
    def group() -> None:
        """Look at data."""

    @data.command()
    def check(
        context: typer.Context,
        recipe: RecipeFile,
        overrides: Overrides = None,
        fix: Annotated[
            str | None, typer.Option(metavar="FILE", help="write the training rows without a finding")
        ] = None,
        json_file: JsonFile = None,
    ) -> None:
        """Find duplicates, leaks, broken and doubtful rows, secrets and long ones, with their lines."""
        call(context, "tunekit.data_check:data_check_verb", recipe, overrides or [], fix, json_file)
