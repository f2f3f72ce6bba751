"""`tunekit init`: writes a first recipe for the user's data, after reading the data and checking the machine and its
cached models. The recipe is valid. If the model is on this machine, its memory is checked too. No file is
overwritten."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunekit.console import Console
from tunekit.data.looking.first_look import (
    LABEL_NAMES,
    LABELS_FORMAT,
    SHARE_KEPT,
    Look,
    label_columns,
    look_at,
    measured,
    number_columns,
    proposed_objectives,
)
from tunekit.data.looking.first_recipe import FirstRecipe, base_of, recipe_text
from tunekit.errors import InputError, Problem, RecipeError, TunekitError
from tunekit.files.durable import write_new_text, write_text
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.dump import yaml_scalar
from tunekit.recipe.reading.names import facts_of, known_names
from tunekit.recipe.reading.schema import schema_text
from tunekit.recipe.reading.shipped import SCHEMA_NAME
from tunekit.recipe.recipe import DEFAULT_METHOD
from tunekit.records import bytes_text

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
EVAL_ROWS, LARGEST_SHARE = 200, 0.2  # enough rows to compare two checkpoints; the maximum share for small data


def init_verb(
    data: str | None, output: str, model: str | None, method: str | None, quantization: str, evaluation: float | None
) -> Path:
    """Write a first recipe to `output`; returns its path.

    Raises: TunekitError if an answer is invalid, or if the file exists already.
    """
    console = Console()
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    target = Path(output) / "recipe.yaml" if os.path.isdir(output) else Path(output)
    _refuse(target)
    models = models_at_hand()
    named = data is not None or asks
    data = data or _ask(asks, "Which data? A file (JSONL, JSON, CSV, Parquet, text) or a hub name", "train.jsonl")
    look = look_at(data) if named else None
    if look is not None:
        look = _labelled(look, asks)
        console.info(look.text(lengths=False))  # the model's tokenizer counts them later, if it is at hand
    base = base_of(look)
    if base is not None:
        models = [name for name in models if name == base]
    usual = base or (models[0] if models else DEFAULT_MODEL)
    if asks and models and model is None:
        console.info("models on this machine: " + ", ".join(models[:8]))
    model = model or _ask(asks, "Which model? A folder, a .gguf file or a hub name", usual)
    question = "Which method? lora, dora, ia3, full (trains every weight), or another method"
    method = method or _ask(asks, question, DEFAULT_METHOD["adapter"])
    if method not in known_names("adapters"):
        raise InputError(f"there is no method '{method}'", f"known methods: {', '.join(known_names('adapters'))}")
    question = "Which share of the rows should be evaluation rows?"
    share = str(evaluation) if evaluation is not None else _ask(asks, question, eval_share(look))
    first = FirstRecipe(data, model, method, quantization, _share(share), look)
    write_text(target, recipe_text(first, target))
    results: Sequence[str] = ()
    if named:
        console.info("planning the run, to see whether it fits this machine ...")
        try:
            first, results = fitted(first, target)
        except TunekitError as error:
            if not all(_is_mended_in_recipe(each) for each in error.problems):
                target.unlink()
                console.info(*([] if look is None else look.notes))
                raise error.without_file(target) from error
            wrote = f"wrote {_with_schema(target)}; the run can be planned after this change of the recipe:"
            raise type(error).of(error.problems, [*error.notes, wrote]) from error
        except BaseException:  # also Ctrl-C
            target.unlink()
            raise
    wrote = _with_schema(target)
    console.info(*results, f"wrote {wrote}; see its training rows with: tunekit preview {shlex.quote(str(target))}")
    console.info(
        *first.reasons, *([] if look is None else look.notes)
    )  # keys to change in the recipe, which now exists
    return target


def _is_mended_in_recipe(problem: Problem) -> bool:
    """Whether a key of the recipe that no option of init sets mends a problem: how the rows are read. The other
    problems are mended by another `tunekit init`, which needs the name of the file."""
    return (problem.key or "").startswith("data.") and problem.key not in ("data.train", "data.eval")


def _with_schema(target: Path) -> str:
    """Write the schema next to the recipe; an existing file stays. Returns the names of the files that are new."""
    schema = target.parent / SCHEMA_NAME
    new = not schema.exists()
    write_new_text(schema.absolute(), schema_text())
    return f"{target} and {schema}, with which editors check and complete the recipe" if new else str(target)


def eval_share(look: Look | None) -> str:
    """The share of the rows for evaluation, as text: EVAL_ROWS rows, but at most LARGEST_SHARE of all rows."""
    # a single text, or a few images of one subject
    if look is not None and (look.rows < 2 or look.settings.measures_training):
        return "0"
    share = LARGEST_SHARE if look is None else EVAL_ROWS / look.rows
    return f"{min(max(round(share, 2), 0.01), LARGEST_SHARE):g}"


def _labelled(look: Look, asks: bool) -> Look:
    """Returns the facts about the data, changed to text classification if the rows have a label column and the user
    agrees. Without a terminal, the column's name decides."""
    columns = label_columns(look.sample) if look.format_name == "text" else {}
    for name, count in columns.items():
        usual = "yes" if name.lower() in LABEL_NAMES else "no"
        question = f"The column {name} has {count} values. Is the task to predict them from the text? yes or no"
        if _ask(asks, question, usual).lower().startswith("y"):
            example = facts_of("formats", LABELS_FORMAT).EXAMPLE
            objective = next(each for each in proposed_objectives() if each.example == example)
            note = f"labels are the {count} values of {name}; to train on the text, write objective: sft, format: text"
            method = objective.model_fields["method"].default
            return replace(
                look, objective=method, format_name=LABELS_FORMAT, columns={name: "label"}, notes=[note, *look.notes]
            )
    notes = [_label_note(name, f"{count} values", "classify") for name, count in columns.items()]
    regression = "{method: classify, problem_type: regression}"
    numbers = number_columns(look.sample) if look.format_name == "text" else []
    notes += [_label_note(name, "numbers", regression) for name in numbers if name not in columns]
    return replace(look, notes=[*look.notes, *notes])


def _label_note(name: str, values: str, objective: str) -> str:
    column = yaml_scalar(name)
    return (
        f"{column} has {values}: to predict them from the text, write objective: {objective}, and data.train: "
        f"{{path: ..., format: {LABELS_FORMAT}, columns: {{{column}: label}}}}"
    )


def _refuse(target: Path) -> None:
    if target.exists():
        raise RecipeError("exists already", "name another file with --output", file=str(target))
    if not target.absolute().parent.is_dir():
        what = f"there is no folder {target.absolute().parent}"
        raise RecipeError(what, "make the folder, or name another file", file=str(target))


def _ask(asks: bool, question: str, default: str) -> str:
    """The user's answer to the question; the default if the answer is empty or `asks` is False."""
    return (input(f"{question} [{default}]: ").strip() or default) if asks else default


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.5:
        raise InputError(f"'{text}' is not a share of the rows", "give a number from 0 to 0.5, such as 0.05")
    return value


def models_at_hand() -> list[str]:
    """Hub names of the models in the Hugging Face cache, the newest first."""
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    folders = Path(hub).expanduser().glob("models--*--*")
    complete = [folder for folder in folders if any(folder.glob("snapshots/*/config.json"))]
    complete.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in complete]


def fitted(first: FirstRecipe, target: Path) -> tuple[FirstRecipe, Sequence[str]]:
    """Plans the recipe, and returns it with notes about the plan. The base is quantized if the run does not fit this
    machine's memory without quantization.

    Raises: TunekitError if planning fails for a reason other than memory or a missing model.
    """
    recipe = load_recipe(target).recipe
    if not (Path(first.model).exists() or first.model in models_at_hand() or first.model.startswith("builtin:")):
        how = "the first run downloads it; `tunekit plan` reads its configuration from the hub"
        return first, [f"{first.model} is not on this machine yet: {how}"]
    from tunekit.machine.devices import make_devices
    from tunekit.machine.drivers import gpu_problem
    from tunekit.machine.memory import available_bytes
    from tunekit.model.families.structure import is_decoder
    from tunekit.objectives.rows.image_text import ImageTextRows
    from tunekit.planning.plan import plan as plan_run
    from tunekit.planning.prepare import prepare, row_kind_at_hand

    devices = make_devices()
    free = available_bytes(devices.device)
    kind = row_kind_at_hand(recipe)
    if first.look is not None and first.look.settings.medium is None and kind is not None:
        first = replace(first, look=measured(first.look, recipe.data.train[0], kind))
    if first.look is not None and isinstance(kind, ImageTextRows):
        proposed, most = first.look.image_tokens, kind.base_images.most_tokens
        first = replace(first, limits_images=most is not None and most > proposed)
    for quantization in dict.fromkeys((first.quantization, *(() if first.adapter.trains_base else ("nf4",)))):
        changed = quantization != first.quantization
        note = "; without quantization the run does not fit this machine's memory" if changed else ""
        first = replace(first, quantization=quantization, note=note)
        write_text(target, recipe_text(first, target))
        prepared = prepare(load_recipe(target), devices.device)
        plan, inputs = plan_run(prepared)
        shorter = inputs.learned_length is not None and first.length > inputs.learned_length
        positions = inputs.learned_length if shorter else first.positions
        known = replace(first, positions=positions, base="decoder" if is_decoder(prepared.base.net) else "encoder")
        write_text(target, recipe_text(known, target))
        if recipe_text(known, target) != recipe_text(first, target):
            plan, _ = plan_run(prepare(load_recipe(target), devices.device))
        first = known
        refused = [f"{refusal.key}: {refusal.message}" for refusal in plan.refusals]
        fits = free is None or plan.peak_bytes.total < free
        if fits and not refused:
            break
    results = [f"{plan.steps:,} steps; predicted peak {bytes_text(plan.peak_bytes.total)}"]
    results[0] += "" if free is None else f" of {bytes_text(free)} free on {devices.device}"
    if (look := first.look) is not None and not look.settings.medium:
        how = "counted with the model's tokenizer" if look.counted else "estimated"
        results.append(f"{SHARE_KEPT:.1%} of the rows have at most {look.longest:,} tokens, {how}")
    rows = plan.rows.training
    if rows.dropped:
        results.append(f"{rows.dropped:,} of {rows.read:,} rows are dropped: " + ", ".join(rows.dropped_reasons))
    if not fits:
        how = "set memory.budget, and `tunekit plan` looks for settings that fit"
        results.append(f"warning: the run does not fit in memory; {how}")
    refused += filter(None, [gpu_problem()])
    return first, [*results, *(f"warning: {text}" for text in refused)]
