"""The commands that use a result: eval, generate, merge, export."""

from typing import Annotated

import typer

from tunekit.commands.completion import named
from tunekit.commands.options import AllowCode, Base, Device, JsonFile, Penalties, TargetKeys, TargetName, keys

app = typer.Typer(rich_markup_mode=None)


@app.command("eval")
def evaluate(
    target: TargetName,
    overrides: Annotated[
        list[str] | None,
        keys(
            "changes keys of model.*, evaluation.* and data.*, such as data.max_length=4096 or "
            "data.eval.0.columns.question=prompt (the file's column question is the field prompt)",
            *("model.", "evaluation.", "data."),
        ),
    ] = None,
    base: Base = None,
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="rows to evaluate on")] = None,
    data_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="the format of the rows in --data",
            autocompletion=named("data.train.0.format"),
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="NAME", help="a metric; may be repeated", autocompletion=named("evaluation.metrics")
        ),
    ] = None,
    adapter_column: Annotated[
        str | None,
        typer.Option("--adapter-column", metavar="NAME", help="the column of --data that names each row's adapter"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAME,FILE.yaml", help="evaluate these tasks of lm-eval instead of rows"),
    ] = None,
    allow_code: AllowCode = False,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Evaluate a run, an adapter or a model."""
    if tasks is not None and (data or data_format or metrics or adapter_column):
        what = "--tasks evaluates tasks and no rows; remove --data, --format, --metric and --adapter-column"
        raise typer.BadParameter(what)
    from tunekit.evaluate import evaluate_tasks, evaluate_verb

    if tasks is None:
        names, changes = metrics or [], overrides or []
        evaluate_verb(target, base, data, data_format, names, json_file, changes, adapter_column, allow_code=allow_code)
    else:
        names = [name for name in tasks.split(",") if name]
        evaluate_tasks(target, base, names, json_file, overrides or [], allow_code=allow_code)


PromptFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|-",
        help='one prompt per line (.jsonl: {"prompt": ...}), a table (.csv, .tsv, .json, .parquet) with a column '
        "prompt or text (for embeddings also query or document), or a folder of recordings or images; a row can name "
        "its adapter's folder in the field adapter",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        min=0,
        max=1,
        help="with --temperature: sample from the most likely tokens with total probability P",
    ),
]


GeneratedOutput = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="PATH",
        help="the folder for images (default: pictures), or the file for embeddings (.npy, .parquet or .jsonl)",
    ),
]


ScoredFile = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="FILE",
        help="a file of answers, which a reward model scores, or of queries with documents, for a reranker",
    ),
]


@app.command()
def generate(
    target: TargetName,
    overrides: TargetKeys = None,
    base: Base = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="a prompt; repeat the option for several")
    ] = None,
    prompts: PromptFile = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="the maximum length of an answer; default: the run's evaluation.max_new_tokens"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0: always the most likely token")] = 0.0,
    top_p: TopP = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="with --temperature: sample from the K most likely tokens"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="the seed of sampling (with --temperature) and of images; default: 0"),
    ] = None,
    score: ScoredFile = None,
    choices: Annotated[
        str | None, typer.Option(metavar="LIST", help="choose the answer from a list, such as '[yes, no]'")
    ] = None,
    output: GeneratedOutput = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="the system prompt")] = None,
    penalty: Penalties = None,
    device: Device = None,
) -> None:
    """Answer prompts, score answers, embed texts, or draw images. Several prompts give JSON lines."""
    from tunekit.generate import generate_verb

    changes, length = overrides or [], max_new_tokens
    texts = prompt or None  # an option that is not given may be an empty list
    generate_verb(
        target,
        base,
        texts,
        prompts,
        changes,
        length,
        temperature,
        top_p,
        top_k,
        seed,
        score,
        choices,
        output,
        system,
        penalty or [],
    )


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter folder, a run or a checkpoint")],
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="the new model folder")],
    overrides: Annotated[list[str] | None, keys("changes keys of model.*", "model.")] = None,
    base: Base = None,
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto",
            metavar="dequantized|full|quantized",
            help="the weights to add the adapter to: dequantized (the values of the quantized base), full (the base's "
            "own weights), quantized (the result is quantized again); default: dequantized, or full without "
            "quantization",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="float32|bfloat16|float16",
            help="the type of the written weights; default: the base's type",
        ),
    ] = None,
) -> None:
    """Write a model folder with the adapter merged into its base."""
    from tunekit.merge import merge_verb

    merge_verb(adapter, output, base, onto, overrides or [], dtype)


@app.command()
def export(
    target: TargetName,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="gguf, ollama, vllm, mlx, onnx, ctranslate2, whispercpp, sentence-transformers, kohya or hub",
        ),
    ],
    output: Annotated[str, typer.Option("--output", metavar="PATH", help="the new file or folder")],
    overrides: Annotated[list[str] | None, keys("changes keys of model.*", "model.")] = None,
    base: Base = None,
    type: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="type of the weights, such as Q4_K_M, or int8 in ctranslate2"),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="write a merged model instead of an adapter")] = False,
    imatrix: Annotated[
        bool, typer.Option("--imatrix", help="weigh the quantization error by the activations on the run's rows")
    ] = False,
    push: Annotated[bool, typer.Option("--push", help="upload the export to the hub")] = False,
    certify: Annotated[
        bool | None,
        typer.Option(
            "--certify/--no-certify",
            help="compare the program's results with torch's; default: only if the program is installed",
        ),
    ] = None,
) -> None:
    """Write a model or an adapter in the format of another program."""
    from tunekit.export import export_verb
    from tunekit.exports.format import Options

    options = Options(type=type, merged=merged, imatrix=imatrix, push=push)
    export_verb(target, to, output, base, options, certify, overrides or [])
