"""The commands that look before anything is trained: data check, reward check."""

from __future__ import annotations

from typing import Annotated

import typer

from tunekit.commands.options import Call, Device, JsonFile, Overrides, RecipeFile


def add_rows(app: typer.Typer, call: Call) -> None:
    """Add them to the program."""
    data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(data, name="data")

    @data.callback()
    def group() -> None:
        """Look at a recipe's rows for faults: data check."""

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

    reward = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(reward, name="reward")

    @reward.callback()
    def rewards() -> None:
        """Try the reward of a recipe: reward check."""

    @reward.command("check")
    def check_reward(
        context: typer.Context,
        recipe: RecipeFile,
        overrides: Overrides = None,
        samples: Annotated[int, typer.Option(metavar="N", min=0, help="of the model before step 1; 0: load none")] = 32,
        device: Device = None,
        json_file: JsonFile = None,
    ) -> None:
        """Try a reward on answers whose worth is known: the rows' own, nothing, one for all, the prompt, long ones."""
        values = (recipe, overrides or [], samples, json_file)
        call(context, "tunekit.reward_check:reward_check_verb", *values, first="check_recipe")
