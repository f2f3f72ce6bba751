"""`tunekit init`: writes a first recipe for the user's data, after reading the data and checking the machine and its
cached models. The recipe is valid. If the model is on this machine, its memory is checked too. No file is
overwritten."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tunekit.console import Console
from tunekit.data.looking.first_look import (
    LABEL_NAMES,
    LABELS_FORMAT,
    ROWS_NAME,
    SHARE_KEPT,
    Look,
    label_columns,
    look_at,
    measured,
    number_columns,
    proposed_objectives,
)
from tunekit.data.reading.several import is_pattern
from tunekit.data.reading.source import rename_columns
from tunekit.errors import InputError, Problem, RecipeError, TunekitError
from tunekit.files.durable import write_new_text, write_text
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.bases.section import AdapterSettings, Line, ObjectiveSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.dump import yaml_scalar
from tunekit.recipe.reading.names import adapter_class, facts_of, known_names, objective_class, unmeasurable
from tunekit.recipe.reading.schema import schema_text
from tunekit.recipe.reading.shipped import SCHEMA_LINE, SCHEMA_NAME, shipped_recipes
from tunekit.recipe.recipe import DEFAULT_METHOD, Recipe
from tunekit.recipe.training import TrainingSection
from tunekit.records import bytes_text

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FEW_ROWS = 1000
EVAL_ROWS, LARGEST_SHARE = 200, 0.2  # enough rows to compare two checkpoints; the maximum share for small data
EVALUATIONS, MOST_STEPS = 10, 100  # evaluations of a run; maximum steps between two evaluations
SPLIT_LENGTH = 1024  # tokens of each piece, if the data is one long text
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
FULL_RATE, FULL_SHARE = 2e-5, 0.1  # full fine-tuning: maximum rate; share of an adapter's rate (TRL's advice)
RATE_COMMENT = "the most important setting: also try a third of this value, and three times this value"
SAMPLED_ANSWERS: Sequence[Line] = (
    ("  samples: 4", "number of rows whose generated answers the report shows, before and after training"),
    ("  max_new_tokens: 64", "maximum length of each answer"),
)
LABEL_METRICS: Sequence[Line] = (("  metrics: [loss, accuracy, macro_f1]", ""),)
NUMBER_METRICS: Sequence[Line] = (("  metrics: [loss, pearson, spearman]", ""),)
LENGTH_COMMENT = {False: "maximum tokens; longer rows are dropped and counted", True: "tokens of each part of the text"}
POSITIONS_COMMENT = "maximum tokens (the model's number of positions); longer rows are dropped and counted"


@dataclass(frozen=True)
class FirstRecipe:
    """The user's choices and the facts about the data, from which a first recipe is written."""

    data: str
    model: str
    method: str
    quantization: str
    evaluation: float
    look: Look | None
    note: str = ""
    positions: int | None = None  # tokens for which the model has learned positions, if rows are longer

    @property
    def adapter(self) -> type[AdapterSettings]:
        """The settings class of the method."""
        return adapter_class(self.method)

    @property
    def objective(self) -> type[ObjectiveSettings]:
        """The settings class of the objective."""
        return _objective(self.look)

    @property
    def length(self) -> int:
        """The value of data.max_length: the smallest of LENGTHS in which the rows fit, but at most the model's number
        of positions."""
        look, usual = self.look, 2048
        if look is not None:
            fitting = next((size for size in LENGTHS if size >= look.longest), LENGTHS[-1])
            usual = SPLIT_LENGTH if _is_split(look) else fitting
        return usual if self.positions is None else min(usual, self.positions)

    @property
    def example(self) -> Recipe | None:
        """The shipped recipe with the base, target modules and learning rate for this objective; None for objectives on
        text."""
        return _example(self.objective)


def init_verb(
    data: str | None, output: str, model: str | None, method: str | None, quantization: str, evaluation: float | None
) -> None:
    """Write a first recipe to `output`. Raises: TunekitError if an answer is invalid, or if the file exists already."""
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
    example = _example(_objective(look))
    if example is not None:
        models = [name for name in models if name == example.model.name_or_path]
    usual = example.model.name_or_path if example else (models[0] if models else DEFAULT_MODEL)
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
                raise error.without_file(target) from error
            wrote = f"wrote {_with_schema(target)}; the run can be planned after this change of the recipe:"
            raise type(error).of(error.problems, [*error.notes, wrote]) from error
        except BaseException:  # also Ctrl-C
            target.unlink()
            raise
    wrote = _with_schema(target)
    console.info(*results, f"wrote {wrote}; see its training rows with: tunekit preview {shlex.quote(str(target))}")
    console.info(*([] if look is None else look.notes))  # keys to change in the recipe, which now exists


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


def _objective(look: Look | None) -> type[ObjectiveSettings]:
    """The objective that fits the rows; without rows, the default objective."""
    return objective_class(look.objective if look else DEFAULT_METHOD["objective"])


@cache
def _example(objective: type[ObjectiveSettings]) -> Recipe | None:
    """The shipped recipe of an objective on recordings or images, because the base models of these objectives differ
    too much for common defaults; None for objectives on text."""
    name = f"{objective.model_fields['method'].default.replace('_', '-')}-{DEFAULT_METHOD['adapter']}"
    return None if objective.medium is None else load_recipe(shipped_recipes()[name]).recipe


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


def recipe_text(first: FirstRecipe, target: Path) -> str:
    """The text of the recipe, with a comment after each key."""
    look, adapter, objective, example = first.look, first.adapter, first.objective, first.example
    split = look is not None and _is_split(look)
    length_comment = LENGTH_COMMENT[split] if first.positions is None or split else POSITIONS_COMMENT
    few = look is not None and look.complete and look.rows < FEW_ROWS and not split
    steps = 2 if few else 8
    interval = _interval(first, 3 if few else 1, steps)
    data, model = (_beside(name, target) for name in (first.data, first.model))
    draws = first.quantization == "none" and objective.shows.draws  # quantization is not offered for image generation
    method, name = [*adapter.first_lines], objective.model_fields["method"].default
    if method and example:
        method.append((f"  target_modules: [{', '.join(example.adapter.model_dump()['target_modules'])}]", ""))
    needed = objective.for_rows([rename_columns(dict(row), dict(look.columns)) for row in look.sample]) if look else {}
    chosen = [("objective:", ""), (f"  method: {name}", ""), *objective.first_lines]
    chosen += [(f"  {key}: {value}", "the type of the labels in the data") for key, value in needed.items()]
    length_of_run = [(f"  epochs: {3 if few else 1}", "")]
    if example and example.training.max_steps:
        keys = ("scheduler", "warmup_steps", "max_steps")
        length_of_run = [(f"  {key}: {getattr(example.training, key)}", "") for key in keys]
    lines = [
        (SCHEMA_LINE, ""),
        (f"# {look.text() if look else 'The recipe to edit'}.", ""),
        ("# Next: tunekit preview (shows the rows), tunekit plan (steps and memory), tunekit train.", ""),
        ("# All keys: tunekit schema --reference", ""),
        ("model:", ""),
        (f"  name_or_path: {yaml_scalar(model)}", f"a folder{' or' if example else ', a .gguf file or'} a hub name"),
        *([] if draws else [(f"  quantization: {first.quantization}", f"nf4: 4 bits per weight{first.note}")]),
        ("data:", ""),
        *_source_lines(data, look),
        (f"  eval: {first.evaluation or 'null'}", _evaluation_said(look, data)),
        *([] if example else [(f"  max_length: {first.length}", length_comment)]),
        *([("  excess_length: split", "")] if split else []),
        ("adapter:", ""),
        (f"  method: {first.method}", "every weight of the base is trained" if adapter.trains_base else ""),
        *method,
        *(chosen if example or needed else [(f"objective: {name}", "")]),
        ("training:", ""),
        (f"  learning_rate: {_rate_text(first_rate(first))}", RATE_COMMENT),
        *length_of_run,
        ("  micro_batch_size: 2", "rows computed together: affects memory and speed, not the result"),
        (f"  gradient_accumulation_steps: {steps}", f"one step trains on 2 x {steps} rows"),
        *([(f"  eval_steps: {interval}", "")] if first.evaluation else []),
        (f"  save_steps: {interval}", "tunekit train --resume continues from the last checkpoint"),
        *(_evaluation_lines(objective, needed) if first.evaluation else []),
        ("output:", ""),
        (f"  dir: {yaml_scalar(f'runs/{target.stem}' if target.stem != 'recipe' else 'runs/first')}", ""),
    ]
    commented = (f"{text:<34} # {comment}" if comment else text for text, comment in lines)
    return "".join(f"\n{line}\n" if line[0].isalpha() else f"{line}\n" for line in commented)  # a gap before a section


def _is_split(look: Look) -> bool:
    """Whether the texts are so long that the recipe splits them into pieces."""
    return look.format_name == "text" and look.longest > LENGTHS[-1]


def _interval(first: FirstRecipe, epochs: int, accumulation: int) -> int:
    """The number of steps between evaluations and between checkpoints. A run then has about EVALUATIONS evaluations."""
    look, example = first.look, first.example
    if look is None:
        return MOST_STEPS
    rows = max(look.rows, look.longest // SPLIT_LENGTH) if _is_split(look) else look.rows
    written = example.training.max_steps if example else None
    total = written or epochs * rows * (1 - first.evaluation) / (2 * accumulation)
    return min(max(round(total / EVALUATIONS), 1), MOST_STEPS)


def _evaluation_lines(objective: type[ObjectiveSettings], needed: Mapping[str, str]) -> list[Line]:
    best = ("  best: eval.loss", "the checkpoint to export; the last checkpoint may be overfitted")
    answers = SAMPLED_ANSWERS if objective.medium is None else ()
    named = NUMBER_METRICS if unmeasurable("accuracy", objective, needed, chosen=False) else LABEL_METRICS
    return [("evaluation:", ""), best, *(named if objective.names_labels else answers)]


def first_rate(first: FirstRecipe) -> float:
    """The learning rate of the first recipe: the rate published for the objective, or else for the method, or else the
    default."""
    adapter, objective, example = first.adapter, first.objective, first.example
    published = objective.default_learning_rate or (None if adapter.trains_base else adapter.default_learning_rate)
    usual = TrainingSection.model_fields["learning_rate"].default if published is None else published.value
    rate: float = example.training.learning_rate if example else usual
    return min(FULL_RATE, FULL_SHARE * rate) if adapter.trains_base else rate


def _rate_text(rate: float) -> str:
    """The rate as text, such as 2e-4."""
    digits, _, power = f"{rate:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _source_lines(data: str, look: Look | None) -> list[Line]:
    """The lines of data.train: the path, and the columns to rename."""
    comment = "a file (JSONL, CSV ...) or a data set on the hub"
    if look and (medium := look.settings.medium):
        comment = f"a folder of {ROWS_NAME[medium]}s, a table that names them (JSONL, CSV ...), or a hub data set"
    if not (look and look.columns):
        return [(f"  train: {yaml_scalar(data)}", comment)]
    columns = ", ".join(f"{yaml_scalar(column)}: {field}" for column, field in look.columns.items())
    return [
        ("  train:", ""),
        (f"    path: {yaml_scalar(data)}", comment),
        *([(f"    format: {LABELS_FORMAT}", "")] if look.format_name == LABELS_FORMAT else []),
        (f"    columns: {{{columns}}}", "the file's column: the format's field"),
    ]


def _evaluation_said(look: Look | None, data: str) -> str:
    """The comment for the key data.eval."""
    if look is None or not look.settings.measures_training:
        return "a share of the rows, or a file"
    return f"write [{yaml_scalar(data)}] to measure the loss on the training images, with fixed noise"


def _beside(name: str, target: Path) -> str:
    """A local path or pattern, made relative to the recipe's folder; a hub name stays unchanged."""
    is_local = Path(name).exists() or is_pattern(os.path.abspath(name))
    return relative_to(name, target.absolute().parent) if is_local else name


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
    from tunekit.planning.plan import plan as plan_run
    from tunekit.planning.prepare import prepare
    from tunekit.planning.row_kind import row_kind_at_hand

    devices = make_devices()
    free = available_bytes(devices.device)
    kind = row_kind_at_hand(recipe)
    if first.look is not None and first.look.settings.medium is None and kind is not None:
        first = replace(first, look=measured(first.look, recipe.data.train[0], kind))
    for quantization in dict.fromkeys((first.quantization, *(() if first.adapter.trains_base else ("nf4",)))):
        changed = quantization != first.quantization
        note = "; without quantization the run does not fit this machine's memory" if changed else ""
        first = replace(first, quantization=quantization, note=note)
        write_text(target, recipe_text(first, target))
        plan, inputs = plan_run(prepare(load_recipe(target), devices.device))
        if inputs.learned_length is not None and first.length > inputs.learned_length:
            first = replace(first, positions=inputs.learned_length)
            write_text(target, recipe_text(first, target))
            plan, _ = plan_run(prepare(load_recipe(target), devices.device))
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
