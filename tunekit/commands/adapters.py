"""The commands that work on adapter folders: show, convert, export-checkpoint, combine, diff and adopt."""

from typing import Annotated

import typer

from tunekit.commands.options import Base, Device, JsonFile, Output

app = typer.Typer(rich_markup_mode=None)
group = typer.Typer(help="Work on adapter folders.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="adapter")


@group.command()
def show(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder, ours or peft's, or a run")],
    json_file: JsonFile = None,
) -> None:
    """Tell what an adapter folder holds; no base model is needed."""
    from tunekit.adapter import show_verb

    show_verb(adapter, json_file)


@group.command()
def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder, ours or peft's, or a run")],
    output: Output,
    rank: Annotated[int | None, typer.Option(metavar="R", help="as the nearest LoRA of this rank")] = None,
    initial: Annotated[
        str | None,
        typer.Option("--initial", metavar="DIR", help="the adapter before training, of PiSSA, OLoRA, CorDA, LoRA-GA"),
    ] = None,
    base: Base = None,
) -> None:
    """Write an adapter as plain LoRA for the untouched base."""
    from tunekit.adapter import convert_verb

    convert_verb(adapter, rank, initial, base, output)


@group.command()
def export_checkpoint(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="RUN@120, RUN@best, RUN@last or a checkpoint folder")
    ],
    output: Output,
    base: Base = None,
) -> None:
    """Write the adapter of a checkpoint, as the run would have after that step."""
    from tunekit.adapter import export_checkpoint_verb

    export_checkpoint_verb(checkpoint, base, output)


@group.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="two or more, of one base")],
    output: Output,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W...", help="such as 0.7,0.3; default: equal, with sum 1")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune; the last four also with _svd",
        ),
    ] = "cat",
    density: Annotated[float | None, typer.Option(metavar="D", help="share of numbers that pruning keeps")] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="R", help="rank of the result of an svd")] = None,
    majority_sign: Annotated[
        str, typer.Option("--majority-sign", metavar="total|frequency", help="how ties finds the sign of a number")
    ] = "total",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="of dare's random choice")] = 0,
    base: Base = None,
) -> None:
    """Make one adapter of several."""
    from tunekit.adapter import combine_verb

    combine_verb(adapters, weights, method, density, rank, majority_sign, seed, base, output)


@group.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="an adapter folder, a run, or a model folder")],
    right: Annotated[str, typer.Argument(metavar="B", help="another of its kind")],
    rank: Annotated[
        int | None, typer.Option("--extract-rank", metavar="R", help="write B minus A as a LoRA of this rank")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="where to write that LoRA")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="rows on which both losses are measured")] = None,
    base: Base = None,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Compare two adapters, or two models, layer by layer."""
    from tunekit.adapter import diff_verb

    diff_verb(left, right, rank, data, base, json_file, output)


@group.command()
def adopt(
    file: Annotated[str, typer.Argument(metavar="FILE", help="a LoRA of diffusers or kohya, .safetensors")],
    output: Output,
    base: Base = None,
) -> None:
    """Write a pipeline's LoRA, as other programs keep it, as an adapter folder."""
    from tunekit.adapter import adopt_verb

    adopt_verb(file, base, output)
