"""The commands that write, translate, list and check recipes: init, import, recipes, schema, validate."""

from pathlib import Path
from typing import Annotated

import typer

from tunekit.commands.completion import named, shipped_name
from tunekit.commands.options import JsonFile, Overrides, RecipeFile
from tunekit.errors import InputError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def init(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="a data file, a folder of recordings or images, or a hub name"),
    ] = None,
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="the new recipe")] = "recipe.yaml",
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="a folder, a .gguf file or a hub name")] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="lora, full, or another method", autocompletion=named("adapter.method")),
    ] = None,
    quantization: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="quantization of the base: none, nf4, ...", autocompletion=named("model.quantization")
        ),
    ] = "none",
    evaluation: Annotated[
        float | None,
        typer.Option(
            "--eval",
            metavar="SHARE",
            help="the share of rows to evaluate on, from 0 to 0.5; default: about 200 rows, at most 0.2",
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="then train, evaluate the result, and show its report")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", metavar="N", min=0.1, help="with --train: search better settings for N minutes"),
    ] = None,
    show_rules: Annotated[
        bool, typer.Option("--show-rules", help="print which values were measured, and on which rows")
    ] = False,
) -> int:
    """Write a first recipe for your data. Reads the data, checks this machine, and asks questions in a terminal."""
    if minutes is not None and not train:
        raise InputError("--minutes limits a search of settings, which only --train starts", "add --train")
    if show_rules:
        from tunekit.recipe.reading.first_values import rules_text

        print(rules_text())
        return 0
    from tunekit.init import init_verb

    recipe = init_verb(data, output, model, method, quantization, evaluation)
    return _train_recipe(str(recipe), minutes) if train else 0


def _train_recipe(recipe: str, minutes: float | None) -> int:
    """Train the recipe, or the settings that a search tries in `minutes`. Then evaluate the best run, and show its
    report."""
    from tunekit.validate import validate

    loaded = validate(recipe)
    folder = Path(loaded.recipe.output.dir)
    if minutes is None:
        from tunekit.train import train_verb

        train_verb(loaded, resume=False, dry_run=False)
    else:
        from tunekit.artifacts.run import SWEEP_NAME, read_json
        from tunekit.sweep import automatic_verb

        automatic_verb(loaded, recipe, [], minutes, resume=False, json_file=None)
        folder /= str((read_json(folder / SWEEP_NAME) or {})["settings"][0]["setting"])
    if loaded.recipe.data.eval:
        from tunekit.evaluate import evaluate_verb

        evaluate_verb(str(folder), None, None, None, [], None, [])
    from tunekit.report import report_verb

    return report_verb([str(folder)], None, None, None)


@app.command("import")
def import_recipe(
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="a file of Axolotl, LLaMA-Factory, TRL, torchtune, Unsloth or PEFT")
    ],
    output: Annotated[str | None, typer.Option("--output", metavar="RECIPE", help="the new recipe")] = None,
) -> None:
    """Convert a configuration of a different tool to a recipe. Lists the result for each key."""
    from tunekit.foreign import import_verb

    import_verb(path, output)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="the recipe to print", autocompletion=shipped_name)
    ] = None,
    copy_to: Annotated[
        str | None, typer.Option("--copy", metavar="PATH", help="copy the recipe to PATH, with its data")
    ] = None,
) -> None:
    """List, print or copy the recipes that come with tunekit."""
    from tunekit.recipes import recipes_verb

    recipes_verb(name, copy_to)


@app.command()
def schema(
    output: Annotated[str | None, typer.Option("--output", metavar="FILE", help="write the schema to FILE")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="print readable text instead of JSON Schema")] = False,
) -> None:
    """Print the JSON Schema of recipes."""
    from tunekit.schema import schema_verb

    schema_verb(output, reference)


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Check a recipe, and that its files exist. Reads only the first row of each file, and no model."""
    from tunekit.validate import validate_verb

    validate_verb(recipe, overrides or [], json_file)
