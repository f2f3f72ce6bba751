"""`tunekit init`: a first recipe for given data, after a look at them, at the machine and at the models at hand. It
validates, and its plan fits where the model can be read here. Nothing is overwritten."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    proposed_objectives,
)
from tunekit.errors import InputError, RecipeError, TunekitError
from tunekit.files.durable import write_new_text, write_text
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.bases.section import AdapterSettings, FirstRecipe, Line
from tunekit.recipe.reading.names import adapter_class, facts_of, known_names, objective_class
from tunekit.recipe.reading.schema import schema_text
from tunekit.recipe.reading.shipped import SCHEMA_LINE, SCHEMA_NAME
from tunekit.recipe.recipe import DEFAULT_METHOD
from tunekit.recipe.training import TrainingSection
from tunekit.records import bytes_text

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FEW_ROWS = 1000
EVAL_ROWS, LARGEST_SHARE = 200, 0.2  # enough to tell two checkpoints apart; of few rows most are to train on
EVALUATIONS, MOST_STEPS = 10, 100  # of a run; steps between two of them
SPLIT_LENGTH = 1024  # of a file that is one long text, the length of its pieces
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
FULL_RATE, FULL_SHARE = 2e-5, 0.1  # of the base's own weights, at most; of an adapter's rate (TRL's advice)
RATE_COMMENT = "what matters most: try a third, threefold"
LENGTH_COMMENT = {False: "tokens; longer rows are dropped, and told", True: "tokens of each piece of a text"}


@dataclass(frozen=True)
class Wanted:
    """What the recipe is to say."""

    data: str
    model: str
    method: str
    quantization: str
    evaluation: float
    look: Look | None
    note: str = ""

    @property
    def adapter(self) -> type[AdapterSettings]:
        """The settings class of the method."""
        return adapter_class(self.method)


def init_verb(
    data: str | None, output: str, model: str | None, method: str | None, quantization: str, evaluation: float | None
) -> None:
    """Write the recipe. Raises: TunekitError where an answer is wrong or a file is in the way."""
    console = Console()
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    target = Path(output) / "recipe.yaml" if os.path.isdir(output) else Path(output)
    _refuse(target)
    found = models_at_hand()
    named = data is not None or asks
    data = data or _ask(asks, "Which data? A file (JSONL, JSON, CSV, Parquet, text) or a hub name", "train.jsonl")
    look = look_at(data) if named else None
    if look is not None:
        look = _labelled(look, asks)
        console.info(look.text(), *look.notes)
    first = _first_recipe(look)
    if first.model:
        found = [name for name in found if name == first.model]
    usual = first.model or (found[0] if found else DEFAULT_MODEL)
    if asks and found and model is None:
        console.info("models at hand: " + ", ".join(found[:8]))
    model = model or _ask(asks, "Which model? A folder, a .gguf file or a hub name", usual)
    question = "Which method? lora, dora, ia3, full (every weight), or another"
    method = method or _ask(asks, question, DEFAULT_METHOD["adapter"])
    if method not in known_names("adapters"):
        raise InputError(f"there is no method '{method}'", f"there are: {', '.join(known_names('adapters'))}")
    question = "Which share of the rows to evaluate on?"
    share = str(evaluation) if evaluation is not None else _ask(asks, question, first.eval_share or eval_share(look))
    wanted = Wanted(data, model, method, quantization, _share(share), look)
    write_text(target, recipe_text(wanted, target))
    said: Sequence[str] = ()
    if named:
        console.info("planning the run, to see whether it fits this machine ...")
        try:
            wanted, said = fitted(wanted, target)
        except TunekitError:
            target.unlink()
            raise
    write_new_text(target.absolute().parent / SCHEMA_NAME, schema_text())  # an older one of ours, or another's, stays
    console.info(*said, f"wrote {target}; look at the rows it trains on: tunekit preview {target}")


def eval_share(look: Look | None) -> str:
    """The share of the rows to hold back: EVAL_ROWS of them, and at most LARGEST_SHARE."""
    if look is not None and look.rows < 2:  # a file of one text
        return "0"
    share = LARGEST_SHARE if look is None else EVAL_ROWS / look.rows
    return f"{min(max(round(share, 2), 0.01), LARGEST_SHARE):g}"


def _labelled(look: Look, asks: bool) -> Look:
    """The look at rows to classify, where they have texts and labels and the user wants that; nobody asked, where the
    column of labels is called so."""
    found = label_columns(look.sample) if look.format_name == "text" else {}
    for name, count in found.items():
        usual = "yes" if name.lower() in LABEL_NAMES else "no"
        question = f"The column {name} has {count} values. Is the task to predict them from the text? yes or no"
        if _ask(asks, question, usual).lower().startswith("y"):
            example = facts_of("formats", LABELS_FORMAT).EXAMPLE
            objective = next(each for each in proposed_objectives() if each.example == example)
            note = f"the labels are those of {name} ({count}); to learn the text instead: objective: sft, format: text"
            method = objective.model_fields["method"].default
            return replace(
                look, objective=method, format_name=LABELS_FORMAT, columns={name: "label"}, notes=[note, *look.notes]
            )
    return replace(look, notes=[*look.notes, *map(_label_note, found, found.values())])


def _label_note(name: str, count: int) -> str:
    return (
        f"{name} has {count} values: to learn them instead of the text, write objective: classify, and as data.train "
        f"{{path: ..., format: {LABELS_FORMAT}, columns: {{{name}: label}}}}"
    )


def _first_recipe(look: Look | None) -> FirstRecipe:
    """That of the objective which fits the rows; of the default one where there are none to look at."""
    return objective_class(look.objective if look else DEFAULT_METHOD["objective"]).first_recipe


def _refuse(target: Path) -> None:
    if target.exists():
        raise RecipeError("exists already", "name another file with --output", file=str(target))
    if not target.absolute().parent.is_dir():
        what = f"there is no folder {target.absolute().parent}"
        raise RecipeError(what, "make it, or name another", file=str(target))


def _ask(asks: bool, question: str, default: str) -> str:
    """The user's answer; the default where nobody can be asked."""
    return (input(f"{question} [{default}]: ").strip() or default) if asks else default


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.5:
        raise InputError(f"'{text}' is no share of the rows", "give a number from 0 to 0.5, such as 0.05")
    return value


def models_at_hand() -> list[str]:
    """Hub names whose files lie in the hub's cache, the newest first."""
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    folders = Path(hub).expanduser().glob("models--*--*")
    complete = [folder for folder in folders if any(folder.glob("snapshots/*/config.json"))]
    complete.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in complete]


def recipe_text(wanted: Wanted, target: Path) -> str:
    """The recipe with what each key means beside it."""
    look, first, adapter = wanted.look, _first_recipe(wanted.look), wanted.adapter
    length = next((size for size in LENGTHS if size >= look.longest), LENGTHS[-1]) if look else 2048
    split = look is not None and _is_split(look)
    length = SPLIT_LENGTH if split else length
    few = look is not None and look.complete and look.rows < FEW_ROWS and not split
    steps = 2 if few else 8
    evaluate, save = _every(wanted, 3 if few else 1, steps)
    data, model = (_beside(name, target) for name in (wanted.data, wanted.model))
    media = look is not None and look.settings.medium is not None
    draws = look is not None and wanted.quantization == "none" and look.settings.shows.draws  # nothing packed there
    method = [*adapter.first_lines]
    if method and first.target_modules:
        method.append((f"  target_modules: {first.target_modules}", ""))
    objective = look.objective if look else DEFAULT_METHOD["objective"]
    chosen = [("objective:", ""), (f"  method: {objective}", ""), *first.objective]
    epochs = [] if any("max_steps" in line for line, _ in first.training) else [(f"  epochs: {3 if few else 1}", "")]
    lines = [
        (SCHEMA_LINE, ""),
        (f"# {look.text() if look else 'The recipe to edit'}.", ""),
        ("# What now: tunekit preview (the rows), tunekit plan (steps and memory), tunekit train.", ""),
        ("# Every key: tunekit schema --reference", ""),
        ("model:", ""),
        (f"  name_or_path: {_quoted(model)}", first.model_comment),
        *([] if draws else [(f"  quantization: {wanted.quantization}", f"nf4: 4 bits a weight{wanted.note}")]),
        ("data:", ""),
        *_source_lines(data, look),
        (f"  eval: {wanted.evaluation or 'null'}", _evaluation_said(look, data)),
        *([] if media else [(f"  max_length: {length}", LENGTH_COMMENT[split])]),
        *([("  excess_length: split", "")] if split else []),
        ("adapter:", ""),
        (f"  method: {wanted.method}", "every weight of the base is trained" if adapter.trains_base else ""),
        *method,
        *(chosen if media else [(f"objective: {objective}", "")]),
        ("training:", ""),
        (f"  learning_rate: {_rate_text(first_rate(wanted))}", RATE_COMMENT),
        *epochs,
        *first.training,
        ("  micro_batch_size: 2", "rows at once: memory, speed, not the result"),
        (f"  gradient_accumulation_steps: {steps}", f"2 x {steps} rows make one step"),
        *([(f"  eval_steps: {evaluate}", "")] if wanted.evaluation else []),
        (f"  save_steps: {save}", "tunekit train --resume goes on from there"),
        *(_evaluation_lines(first) if wanted.evaluation else []),
        ("output:", ""),
        (f"  dir: runs/{target.stem if target.stem != 'recipe' else 'first'}", ""),
    ]
    commented = (f"{text:<34} # {comment}" if comment else text for text, comment in lines)
    return "".join(f"\n{line}\n" if line[0].isalpha() else f"{line}\n" for line in commented)  # a gap before a section


def _is_split(look: Look) -> bool:
    """Whether its texts are so long that they are cut into pieces."""
    return look.format_name == "text" and look.longest > LENGTHS[-1]


def _every(wanted: Wanted, epochs: int, accumulation: int) -> tuple[int, int]:
    """Steps between evaluations, about EVALUATIONS of them in a run, and between checkpoints."""
    look, first = wanted.look, _first_recipe(wanted.look)
    if look is None:
        return MOST_STEPS, MOST_STEPS
    written = next((int(line.split(":")[1]) for line, _ in first.training if "max_steps" in line), None)
    rows = max(look.rows, look.longest // SPLIT_LENGTH) if _is_split(look) else look.rows
    total = written or epochs * rows * (1 - wanted.evaluation) / (2 * accumulation)
    every = min(max(round(total / EVALUATIONS), 1), MOST_STEPS)
    return every, every


def _evaluation_lines(first: FirstRecipe) -> list[Line]:
    best = ("  best: eval.loss", "the checkpoint that is kept as the result; the last one may be overfitted")
    return [("evaluation:", ""), best, *first.evaluation]


def first_rate(wanted: Wanted) -> float:
    """The learning rate of the objective, else of the method, else that of a recipe that writes none."""
    first, adapter = _first_recipe(wanted.look), wanted.adapter
    objective = objective_class(wanted.look.objective if wanted.look else DEFAULT_METHOD["objective"])
    published = objective.default_learning_rate or (None if adapter.trains_base else adapter.default_learning_rate)
    usual = TrainingSection.model_fields["learning_rate"].default if published is None else published.value
    rate = float(first.learning_rate or usual)
    return min(FULL_RATE, FULL_SHARE * rate) if adapter.trains_base else rate


def _rate_text(rate: float) -> str:
    """Such as 2e-4."""
    digits, _, power = f"{rate:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _source_lines(data: str, look: Look | None) -> list[Line]:
    """data.train: a name, and how its columns are renamed where they are."""
    said = "a file (JSONL, CSV ...) or a hub data set"
    if look and (medium := look.settings.medium):
        said = f"a folder of {ROWS_NAME[medium]}s, a table that names them (JSONL, CSV ...), or a hub data set"
    if not (look and look.columns):
        return [(f"  train: {_quoted(data)}", said)]
    columns = ", ".join(f"{_quoted(column)}: {field}" for column, field in look.columns.items())
    return [
        ("  train:", ""),
        (f"    path: {_quoted(data)}", said),
        *([(f"    format: {LABELS_FORMAT}", "")] if look.format_name == LABELS_FORMAT else []),
        (f"    columns: {{{columns}}}", "the file's column: the format's field"),
    ]


def _evaluation_said(look: Look | None, data: str) -> str:
    """Beside data.eval."""
    if look is None or not look.settings.measures_training:
        return "a share of the rows, or a file"
    return f"[{_quoted(data)}] measures these images themselves, at fixed noise: whether the loss falls"


def _beside(name: str, target: Path) -> str:
    """A local path as the recipe's folder sees it; another name as it is."""
    return relative_to(name, target.absolute().parent) if Path(name).exists() else name


def _quoted(text: str) -> str:
    """As YAML reads it back."""
    plain = all(letter.isalnum() or letter in "/._-" for letter in text) and text[:1] not in ("", "_", "-")
    return text if plain else "'" + text.replace("'", "''") + "'"


def fitted(wanted: Wanted, target: Path) -> tuple[Wanted, Sequence[str]]:
    """The recipe again with a smaller base where its plan does not fit this machine, and what was found.

    Raises: TunekitError where the recipe cannot be planned for a reason that is not memory or an absent model.
    """
    from tunekit.recipe.load import load_recipe

    recipe = load_recipe(target).recipe
    if not Path(wanted.model).exists() and wanted.model not in models_at_hand():
        return wanted, [f"{wanted.model} is not here yet: the first run fetches it, and `tunekit plan` asks the hub"]
    from tunekit.machine.devices import make_devices
    from tunekit.machine.memory import available_bytes
    from tunekit.planning.plan import make_plan
    from tunekit.planning.row_kind import row_kind_at_hand

    devices = make_devices()
    free = available_bytes(devices.device)
    kind = row_kind_at_hand(recipe)
    if wanted.look is not None and wanted.look.settings.medium is None and kind is not None:
        wanted = replace(wanted, look=measured(wanted.look, recipe.data.train[0], kind))
    for quantization in dict.fromkeys((wanted.quantization, *(() if wanted.adapter.trains_base else ("nf4",)))):
        changed = quantization != wanted.quantization
        note = "; without it this machine's memory does not hold the run" if changed else ""
        wanted = replace(wanted, quantization=quantization, note=note)
        write_text(target, recipe_text(wanted, target))
        plan, _ = make_plan(load_recipe(target), device=devices.device)
        refused = [f"{refusal.key}: {refusal.message}" for refusal in plan.refusals]
        fits = free is None or plan.peak_bytes.total < free
        if fits and not refused:
            break
    said = [f"{plan.steps:,} steps; predicted peak {bytes_text(plan.peak_bytes.total)}"]
    said[0] += "" if free is None else f" of {bytes_text(free)} free on {devices.device}"
    if (look := wanted.look) is not None and look.counted:
        said.append(f"{SHARE_KEPT:.1%} of the rows have at most {look.longest:,} tokens, by the model's tokenizer")
    rows = plan.rows.training
    if rows.dropped:
        said.append(f"{rows.dropped:,} of {rows.read:,} rows are dropped: " + ", ".join(rows.dropped_reasons))
    if not fits:
        said.append("warning: that does not fit; set memory.budget, and plan finds a way or says why there is none")
    return wanted, [*said, *(f"warning: {text}" for text in refused)]
