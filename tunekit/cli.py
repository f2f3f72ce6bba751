"""The commands: parses the command line, calls one verb, prints what went wrong and sets the exit code.

Comes in: sys.argv.  Goes out: an exit code (README and `tunekit --help` list them).  A verb's module is imported only
when the verb is called, so that --help and validate never wait for torch.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer

from tunekit import __version__
from tunekit.commands.adapters import add_adapters
from tunekit.commands.completion import named, override, shipped_name
from tunekit.commands.options import (
    Base,
    Device,
    JsonFile,
    MergeOverrides,
    Overrides,
    RecipeFile,
    Target,
    TargetOverrides,
)
from tunekit.commands.order import InOrderOfUse
from tunekit.commands.results import add_results
from tunekit.commands.rows import add_rows
from tunekit.commands.talk import add_talk
from tunekit.console.loudness import LOUDNESS, is_quiet
from tunekit.errors import EXIT_FAULT, ResourceError, redact, told
from tunekit.machine.malloc import KEPT_KERNELS

EXIT_BROKEN_PIPE = 141
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products; read when CUDA starts
    "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),  # the older name
    **dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(KEPT_KERNELS)),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYDANTIC_DISABLE_PLUGINS": "1",  # looking for some takes longer than reading a recipe
}
# importing torch and transformers makes 100,000s of objects that stay: looking through them again and again took a
# fifth of a start (0.6 of 3.3 CPU seconds, measured); training sets the collector back
WHILE_STARTING = (100_000, 20, 100)
LIGHT = {
    f"tunekit.{verb}" for verb in ("validate", "foreign", "recipes", "init", "schema", "runs")
}  # which import no torch

app = typer.Typer(
    name="tunekit",
    cls=InOrderOfUse,
    help="Fine-tune language models from a YAML recipe.",
    epilog="Exit codes: 0 done; 1 a fault of tunekit; 2 the recipe or an input is wrong; 3 the numbers went wrong; "
    "4 memory, disk or another resource ran out; 129, 130, 143 hung up, interrupted, terminated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tunekit {__version__}")
        raise typer.Exit


@app.callback()
def start(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only results, warnings and errors")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="also the seconds of each part, and what the libraries log")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Fine-tune language models from a YAML recipe."""
    context.obj = debug
    if quiet or verbose:
        os.environ[LOUDNESS] = "verbose" if verbose else "quiet"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@app.command()
def validate(
    context: typer.Context, recipe: RecipeFile, overrides: Overrides = None, json_file: JsonFile = None
) -> None:
    """Check a recipe and that its files are there. Nothing is loaded."""
    _call(context, "tunekit.validate:validate_verb", recipe, overrides or [], json_file)


@app.command()
def plan(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Show what train would do: steps, memory, what is refused."""
    _call(context, "tunekit.plan:plan_verb", recipe, overrides or [], json_file, first="check_recipe")


@app.command()
def preview(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", metavar="N", min=1, help="how many rows")] = 3,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="write a page there")] = None,
) -> None:
    """Show real training rows: which tokens are trained on."""
    _call(context, "tunekit.preview:preview_verb", recipe, overrides or [], rows, html, first="check_recipe")


@app.command()
def train(
    context: typer.Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="load and try the longest batch; write nothing")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="begin anew; an old run is moved aside, to RUN.1, never deleted")
    ] = False,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Train, and write the run folder."""
    words = overrides or []
    first = "" if resume else "check_recipe" if dry_run or overwrite else "check_new_run"
    _call(context, "tunekit.train:train_verb", recipe, words, resume, dry_run, overwrite, json_file, first=first)


@app.command("eval")
def evaluate(
    context: typer.Context,
    target: Target,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="of model.*, evaluation.* and data.*, such as data.max_length=4096 or "
            "data.eval.0.columns.question=prompt (the file's column, the format's field)",
            autocompletion=override("model.", "evaluation.", "data."),
        ),
    ] = None,
    base: Base = None,
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="rows to evaluate on")] = None,
    data_format: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="what a row is", autocompletion=named("data.train.0.format")),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="may be repeated", autocompletion=named("evaluation.metrics")),
    ] = None,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Measure a run, an adapter or a model."""
    values = (target, base, data, data_format, metrics or [], json_file, overrides or [])
    _call(context, "tunekit.evaluate:evaluate_verb", *values)


@app.command()
def generate(
    context: typer.Context,
    target: Target,
    overrides: TargetOverrides = None,
    base: Base = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="one prompt")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE|-", help='one a line (.jsonl: {"prompt": ...})')] = None,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="most tokens of an answer")] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float | None, typer.Option(metavar="P", min=0, max=1, help="draw from the top share P")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", min=1, help="draw from the K likeliest tokens")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="of sampling; default: 0")] = None,
    score: Annotated[str | None, typer.Option("--score", metavar="FILE", help="answers, for a reward model")] = None,
    choices: Annotated[str | None, typer.Option(metavar="LIST", help="answer with one of '[yes, no]'")] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="where images go; default: pictures")] = None,
    device: Device = None,
) -> None:
    """Answer prompts, score answers, or draw pictures. Plain text for --prompt, one JSON object a line for several."""
    asked = (target, base, prompt, prompts, overrides or [])
    values = (*asked, max_new_tokens, temperature, top_p, top_k, seed, score, choices, output)
    _call(context, "tunekit.generate:generate_verb", *values)


@app.command()
def merge(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder, a run or a checkpoint")],
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="the new model folder")],
    overrides: MergeOverrides = None,
    base: Base = None,
    onto: Annotated[
        str | None, typer.Option("--onto", metavar="dequantized|full|quantized", help="which base weights to add to")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="float32|bfloat16|float16", help="of the written weights; default: the base's"),
    ] = None,
) -> None:
    """Merge an adapter into its base."""
    _call(context, "tunekit.merge:merge_verb", adapter, output, base, onto, overrides or [], dtype)


@app.command()
def recipes(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="print this one", autocompletion=shipped_name)
    ] = None,
    copy_to: Annotated[str | None, typer.Option("--copy", metavar="PATH", help="copy it there, with its data")] = None,
) -> None:
    """List, print or copy the recipes that come with tunekit."""
    _call(context, "tunekit.recipes:recipes_verb", name, copy_to)


@app.command("import")
def import_recipe(
    context: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="of Axolotl, LLaMA-Factory, TRL, torchtune, Unsloth or PEFT")
    ],
    output: Annotated[str | None, typer.Option("--output", metavar="RECIPE", help="write the recipe there")] = None,
) -> None:
    """Turn another tool's configuration into a recipe. Tells what became of each key."""
    _call(context, "tunekit.foreign:import_verb", path, output)


@app.command()
def init(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="a file of rows, a folder of recordings or images, or a hub name"),
    ] = None,
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="the new recipe")] = "recipe.yaml",
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="a folder, a .gguf file or a hub name")] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="lora, full, or another method", autocompletion=named("adapter.method")),
    ] = None,
    quantization: Annotated[
        str,
        typer.Option(metavar="NAME", help="of the base: none, nf4, ...", autocompletion=named("model.quantization")),
    ] = "none",
    evaluation: Annotated[
        float | None, typer.Option("--eval", metavar="SHARE", help="of the rows to hold back")
    ] = None,
) -> None:
    """Write a first recipe for your data. Looks at them and at this machine; asks in a terminal."""
    _call(context, "tunekit.init:init_verb", data, output, model, method, quantization, evaluation)


@app.command()
def schema(
    context: typer.Context,
    output: Annotated[str | None, typer.Option("--output", metavar="FILE", help="write it there")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="a text for people instead of JSON Schema")] = False,
) -> None:
    """Print the JSON Schema of recipes."""
    _call(context, "tunekit.schema:schema_verb", output, reference)


def _call(context: typer.Context, verb: str, *values: Any, first: str = "") -> None:
    """Import a verb, call it, and turn whatever happens into words on stderr and an exit code.

    `first`: of tunekit.validate, given the recipe and its overrides before the verb is so much as imported.
    """
    if verb.partition(":")[0] not in LIGHT and sys.stderr.isatty() and not is_quiet():
        print("loading ...", file=sys.stderr, flush=True)
    ordinary, code = gc.get_threshold(), 0
    gc.set_threshold(*WHILE_STARTING)
    try:
        if first:
            getattr(import_module("tunekit.validate"), first)(*values[:2])
        module, _, function = verb.partition(":")
        code = getattr(import_module(module), function)(*values) or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if context.obj and not isinstance(error, BrokenPipeError):
            print(redact(traceback.format_exc()), file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains once more when it flushes
            code = EXIT_BROKEN_PIPE
        else:
            code = _say(*told(error))
    finally:
        gc.set_threshold(*ordinary)
    raise typer.Exit(code)


def _say(text: str, code: int) -> int:
    """Print what went wrong, once: what ends a run with these codes, the main rank (of torchrun) says for all."""
    told_by_main = code not in (EXIT_FAULT, ResourceError.exit_code) and os.environ.get("RANK", "0") != "0"
    if not told_by_main:
        print(redact(text), file=sys.stderr)
    return code


for add in (add_adapters, add_rows, add_results, add_talk):
    add(app, _call)


def main() -> None:
    """The `tunekit` script."""
    if sys.stdout is None or sys.stderr is None:  # closed by the caller (`>&-`)
        silent = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        sys.stdout, sys.stderr = sys.stdout or silent, sys.stderr or silent
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no error
    app()
