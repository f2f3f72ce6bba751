"""The commands that work on adapter folders: show, combine, convert, export-checkpoint, adopt and diff; and export."""

from __future__ import annotations

from typing import Annotated

import typer

from tunekit.commands.options import Base, Call, Device, JsonFile, Output


def add_adapters(app: typer.Typer, call: Call) -> None:
    """Add them to the program, below `adapter`."""
    group = typer.Typer(help="Work on adapter folders.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="adapter")

    @group.command()
    def show(
        context: typer.Context,
        adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder, ours or peft's, or a run")],
        json_file: JsonFile = None,
    ) -> None:
        """Tell what an adapter folder holds; no base model is needed."""
        call(context, "tunekit.adapter:show_verb", adapter, json_file)

    @group.command()
    def convert(
        context: typer.Context,
        adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder, ours or peft's, or a run")],
        output: Output,
        rank: Annotated[int | None, typer.Option(metavar="R", help="as the nearest LoRA of this rank")] = None,
        initial: Annotated[
            str | None,
            typer.Option(
                "--initial", metavar="DIR", help="the adapter before training, of PiSSA, OLoRA, CorDA, LoRA-GA"
            ),
        ] = None,
        base: Base = None,
    ) -> None:
        """Write an adapter as plain LoRA for the untouched base."""
        call(context, "tunekit.adapter:convert_verb", adapter, rank, initial, base, output)

    @group.command()
    def export_checkpoint(
        context: typer.Context,
        checkpoint: Annotated[
            str, typer.Argument(metavar="CHECKPOINT", help="RUN@120, RUN@best, RUN@last or a checkpoint folder")
        ],
        output: Output,
        base: Base = None,
    ) -> None:
        """Write the adapter of a checkpoint, as the run would have after that step."""
        call(context, "tunekit.export_checkpoint:export_checkpoint_verb", checkpoint, base, output)

    _add_of_several(group, call)
    _add_of_pipelines(app, group, call)


def _add_of_pipelines(app: typer.Typer, group: typer.Typer, call: Call) -> None:
    """Those that know the files of other programs."""

    @group.command()
    def adopt(
        context: typer.Context,
        file: Annotated[str, typer.Argument(metavar="FILE", help="a LoRA of diffusers or kohya, .safetensors")],
        output: Output,
        base: Base = None,
    ) -> None:
        """Write a pipeline's LoRA, as other programs keep it, as an adapter folder."""
        call(context, "tunekit.export:adopt_verb", file, base, output)

    @app.command()
    def export(
        context: typer.Context,
        adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="of a diffusion pipeline, or a run")],
        to: Annotated[str, typer.Option("--to", metavar="kohya", help="the format")],
        output: Annotated[str, typer.Option("--output", metavar="FILE", help="the new .safetensors file")],
        base: Base = None,
    ) -> None:
        """Write an adapter as another program reads it."""
        call(context, "tunekit.export:export_verb", adapter, to, output, base)


def _add_of_several(group: typer.Typer, call: Call) -> None:
    """Those that take more than one."""

    @group.command()
    def combine(
        context: typer.Context,
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
        values = (adapters, weights, method, density, rank, majority_sign, seed, base, output)
        call(context, "tunekit.adapter:combine_verb", *values)

    @group.command()
    def diff(
        context: typer.Context,
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
        call(context, "tunekit.adapter:diff_verb", left, right, rank, data, base, json_file, output)
