"""The commands that work on adapter folders: show, convert, export-checkpoint, combine, diff and adopt."""

from typing import Annotated

import typer

from tunekit.commands.options import AllowCode, Base, Device, JsonFile, Output

app = typer.Typer(rich_markup_mode=None)
group = typer.Typer(help="Work on adapter folders.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="adapter")


@group.command()
def show(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder, ours or peft's, or a run")],
    json_file: JsonFile = None,
) -> None:
    """Show the content of an adapter folder. The base model is not needed."""
    from tunekit.adapter import show_verb

    show_verb(adapter, json_file)


@group.command()
def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder of tunekit or peft, or a run")],
    output: Output,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R", help="approximate the adapter by a LoRA of rank R; default: only an exact conversion"
        ),
    ] = None,
    initial: Annotated[
        str | None,
        typer.Option(
            "--initial", metavar="DIR", help="the adapter before training, needed for PiSSA, OLoRA, CorDA and LoRA-GA"
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="base|text",
            help="only rename modules: to the class in the base's config.json, or to the text class of a composite "
            "model",
        ),
    ] = None,
    base: Base = None,
) -> None:
    """Convert an adapter to plain LoRA, or rename its modules."""
    from tunekit.adapter import convert_verb, rename_verb

    if names is not None:
        rename_verb(adapter, names, base, output)
    else:
        convert_verb(adapter, rank, initial, base, output)


@group.command()
def export_checkpoint(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="RUN@120, RUN@best, RUN@last or a checkpoint folder")
    ],
    output: Output,
    base: Base = None,
    allow_code: AllowCode = False,
) -> None:
    """Write the adapter of a checkpoint as an adapter folder."""
    from tunekit.adapter import export_checkpoint_verb

    export_checkpoint_verb(checkpoint, base, output, allow_code=allow_code)


@group.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="two or more adapters of the same base")],
    output: Output,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W...",
            help="the weight of each adapter, such as 0.7,0.3; default: equal weights with sum 1",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune; the last four also as NAME_svd",
        ),
    ] = "cat",
    density: Annotated[float | None, typer.Option(metavar="D", help="the share of values that pruning keeps")] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", help="the rank of the result, for methods with svd")
    ] = None,
    majority_sign: Annotated[
        str | None,
        typer.Option(
            "--majority-sign",
            metavar="total|frequency",
            help="for ties: how the sign of a value is chosen; default: total",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="for dare: the seed of the random choice of values; default: 0"),
    ] = None,
    base: Base = None,
) -> None:
    """Combine several adapters into one."""
    from tunekit.adapter import combine_verb

    combine_verb(adapters, weights, method, density, rank, majority_sign, seed, base, output)


@group.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="an adapter folder, a run, or a model folder")],
    right: Annotated[str, typer.Argument(metavar="B", help="a second adapter folder, run or model folder, like A")],
    rank: Annotated[
        int | None, typer.Option("--extract-rank", metavar="R", help="write B minus A as a LoRA of this rank")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="the new folder for this LoRA")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="rows on which the losses of A and B are measured")
    ] = None,
    base: Base = None,
    allow_code: AllowCode = False,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Compare two adapters, or two models, layer by layer."""
    from tunekit.adapter import diff_verb

    diff_verb(left, right, rank, data, base, json_file, output, allow_code=allow_code)


@group.command(short_help="Convert a LoRA file of a diffusion pipeline.")
def adopt(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="a .safetensors file with a LoRA in the format of diffusers or kohya")
    ],
    output: Output,
    base: Base = None,
) -> None:
    """Convert a LoRA file of a diffusion pipeline to an adapter folder."""
    from tunekit.adapter import adopt_verb

    adopt_verb(file, base, output)
