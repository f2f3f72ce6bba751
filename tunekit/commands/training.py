"""The commands that read the rows of a recipe, or train on them: data check, reward check, preview, plan, train,
sweep and launch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunekit.commands.completion import among
from tunekit.commands.options import (
    AllowCode,
    Device,
    JsonFile,
    LaunchDevice,
    Overrides,
    RecipeFile,
    SweptOverrides,
    TargetKeys,
)

if TYPE_CHECKING:
    from tunekit.recipe.load import LoadedRecipe

app = typer.Typer(rich_markup_mode=None)
data = typer.Typer(
    help="Check rows (check), rank them (rank), or mine negatives (mine).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
reward = typer.Typer(help="Test the reward of a recipe: reward check.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")
app.add_typer(reward, name="reward")


def _checked(recipe: str, overrides: list[str] | None) -> LoadedRecipe:
    """Load and check the recipe before the command imports torch, because that import takes seconds."""
    from tunekit.validate import validate

    return validate(recipe, overrides or [])


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = None,
    json_file: JsonFile = None,
    ranks: Annotated[int, typer.Option("--ranks", metavar="N", min=1, help="plan a run of N processes")] = 1,
    card: Annotated[str | None, typer.Option(metavar="NAME", help="a card that is not here, such as h100-80")] = None,
) -> None:
    """Show the steps and the predicted memory of a training run. Refuses a recipe that cannot work."""
    loaded = _checked(recipe, overrides)
    from tunekit.plan import plan_verb

    plan_verb(loaded, json_file, ranks, device, card)


@app.command()
def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", metavar="N", min=1, help="how many rows")] = 3,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="write an HTML page to FILE")] = None,
) -> None:
    """Show training rows, and which of their tokens are trained on."""
    loaded = _checked(recipe, overrides)
    from tunekit.preview import preview_verb

    preview_verb(loaded, rows, html)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="load the model and run the longest batch; write nothing")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="start a new run; an existing run is moved to RUN.1, never deleted")
    ] = False,
    accepted: Annotated[
        list[str] | None,
        typer.Option(
            "--accept-changed",
            metavar="KEY",
            help="with --resume: continue although files of this key (such as objective.reward) changed; the "
            "report states this",
        ),
    ] = None,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Train, and write the run folder."""
    from tunekit.artifacts.run import refuse_old_run
    from tunekit.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or []) if resume else _checked(recipe, overrides)
    if not (resume or dry_run or overwrite):
        refuse_old_run(Path(loaded.recipe.output.dir))
    from tunekit.train import train_verb

    train_verb(loaded, resume, dry_run, overwrite, json_file, accepted or [])


@app.command()
def sweep(
    recipe: RecipeFile,
    overrides: SweptOverrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the trials that are not finished")] = False,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="let tunekit choose the values: learning rates, ranks and epochs that fit into --minutes"
        ),
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", metavar="N", min=0.1, help="with --auto: the time limit of all trials together"),
    ] = None,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Train a recipe with several values of its keys, and compare."""
    from tunekit.errors import InputError
    from tunekit.validate import validate_sweep

    if auto != (minutes is not None):
        raise InputError("--auto and --minutes need each other", "write, for example, --auto --minutes 30")
    if minutes is not None:
        checked = _checked(recipe, overrides)
        from tunekit.sweep import automatic_verb

        automatic_verb(checked, recipe, overrides or [], minutes, resume, json_file)
        return
    loaded = validate_sweep(recipe, overrides or [])
    from tunekit.sweep import sweep_verb

    sweep_verb(loaded, resume, json_file)


@app.command()
def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help="torchrun, slurm, skypilot, kubernetes or ray",
            autocompletion=among("torchrun", "slurm", "skypilot", "kubernetes", "ray"),
        ),
    ] = "torchrun",
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="the number of machines")] = 1,
    gpus: Annotated[
        int, typer.Option(metavar="N", min=1, help="GPUs per node (with --device cpu: processes per node)")
    ] = 1,
    output: Annotated[str | None, typer.Option("--output", metavar="FILE", help="the new launch file")] = None,
    device: LaunchDevice = None,
) -> None:
    """Write the file that starts a run on several GPUs or a cluster."""
    from tunekit.errors import InputError

    if device not in (None, "cpu"):
        raise InputError(f"--device {device}: each process of a launch file chooses its own GPU", "remove it")
    loaded = _checked(recipe, overrides)
    from tunekit.launch import launch_verb

    launch_verb(loaded, recipe, overrides or [], on, nodes, gpus, output)


@data.command(short_help="Find rows with problems, and print their line numbers.")
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    fix: Annotated[
        str | None, typer.Option(metavar="FILE", help="write the training rows without findings to FILE")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace FILE of --fix if it exists")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 2 for warnings too, not only for errors")] = False,
    json_file: JsonFile = None,
) -> int:
    """Find duplicate, leaked, invalid, suspicious and long rows, and rows with secrets. Prints their line numbers."""
    from tunekit.data_check import data_check_verb
    from tunekit.recipe.load import load_recipe

    return data_check_verb(load_recipe(recipe, overrides or []), fix, json_file, overwrite=overwrite, strict=strict)


@data.command(short_help="List rows that are likely wrong, or teach nothing.")
def rank(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a finished run")],
    keep: Annotated[
        float | None, typer.Option(metavar="SHARE", min=0.01, max=1, help="the share of the training rows to keep")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="with --keep: write the rows to keep to FILE")
    ] = None,
    influence: Annotated[
        bool, typer.Option("--influence", help="also estimate each row's influence on the evaluation rows")
    ] = False,
    allow_code: AllowCode = False,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """List the training rows of a run that are likely wrong, teach nothing, or teach the same as other rows."""
    from tunekit.data_rank import data_rank_verb

    data_rank_verb(run, keep, output, influence, json_file, allow_code=allow_code)


@data.command(short_help="Add hard negatives to rows of queries and documents.")
def mine(
    target: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="the rows, and the model that searches them")],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="write the rows with their negatives to FILE")
    ],
    overrides: TargetKeys = None,
    negatives: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="new negatives of each row")] = 3,
    margin: Annotated[
        float,
        typer.Option(metavar="M", min=0, max=1, help="how much less similar than the positive, as a share of it"),
    ] = 0.05,
    reranker: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="a reranker; its scores of the documents found decide, not their similarity"),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(metavar="FILE", help="documents to search, in addition to those of the rows")
    ] = None,
    allow_code: AllowCode = False,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Find documents that are similar to a query but not its positives, with the base of a recipe or with a run."""
    from tunekit.data_mine import data_mine_verb

    changes = overrides or []
    data_mine_verb(
        target,
        output,
        json_file,
        changes,
        negatives=negatives,
        margin=margin,
        reranker=reranker,
        corpus=corpus,
        allow_code=allow_code,
    )


@reward.command("check", short_help="Test a reward on good and on bad answers.")
def check_reward(
    recipe: RecipeFile,
    overrides: Overrides = None,
    samples: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="also test N answers of the untrained model; 0: do not load the model"),
    ] = 32,
    device: Device = None,
    json_file: JsonFile = None,
) -> int:
    """Test a reward on reference answers and on bad answers: empty, constant or long answers, and the prompt itself."""
    loaded = _checked(recipe, overrides)
    from tunekit.reward_check import reward_check_verb

    return reward_check_verb(loaded, samples, json_file)
