"""`tunekit init`: a first recipe for given data, after a look at them, at the machine and at the models at hand. It
validates, and its plan fits where the model can be read here. Nothing is overwritten."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tunekit.console import Console
from tunekit.data.reading.first import choose_format, columns_meant
from tunekit.data.reading.folder import MEDIA, is_folder, is_media, passed_over, with_table
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import read_source
from tunekit.errors import DataError, InputError, RecipeError, TunekitError
from tunekit.files.durable import write_new_text, write_text
from tunekit.recipe.bases.section import AdapterSettings, FirstRecipe, Line, ObjectiveSettings
from tunekit.recipe.data import Source
from tunekit.recipe.reading.names import adapter_class, facts_of, known_names, objective_class
from tunekit.recipe.reading.schema import schema_text
from tunekit.recipe.reading.shipped import SCHEMA_LINE, SCHEMA_NAME
from tunekit.recipe.recipe import DEFAULT_METHOD
from tunekit.records import bytes_text

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOOKED_AT = 20_000  # rows
CHARACTERS_OF_A_TOKEN = 3.5  # of English text; only a guess before a tokenizer has seen the rows
FEW_ROWS = 1000
SHARE_KEPT = 0.995  # of the rows, by length
LONGEST_LABEL, ROWS_OF_A_LABEL = 60, 4  # characters; rows of each value, on average, where a column holds labels
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ROWS_NAME = {"audio": "recording", "image": "image", None: "row"}  # medium -> what a row is
QUESTIONS_FORMAT = "prompt_completion"  # of which columns of questions and answers are renamed
FULL_RATE = "2e-5"  # of the base's own weights
RATE_COMMENT = "what matters most: try a third, threefold"


@dataclass(frozen=True)
class Look:
    """What the rows of a data file are like."""

    objective: str
    format_name: str
    rows: int
    complete: bool  # whether these are all of them
    longest: int  # tokens of all rows but the very longest, guessed
    fields: tuple[str, ...]
    columns: Mapping[str, str]  # how the recipe renames them, where no format has these names
    notes: Sequence[str] = ()  # what the user may have meant instead

    @property
    def settings(self) -> type[ObjectiveSettings]:
        """The settings class of the objective."""
        return objective_class(self.objective)

    def text(self) -> str:
        """In a line."""
        unit = ROWS_NAME[self.settings.medium] + ("" if self.rows == 1 else "s")
        about = f"{self.rows:,} {unit}" if self.complete else f"more than {self.rows:,} {unit}"
        sizes = f", {SHARE_KEPT:.1%} of them shorter than about {self.longest:,} tokens"
        share = "" if self.settings.medium else sizes
        return f"{about} of format {self.format_name} ({', '.join(self.fields)}){share}: objective {self.objective}"


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
    share = str(evaluation) if evaluation is not None else _ask(asks, question, first.eval_share)
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


def _first_recipe(look: Look | None) -> FirstRecipe:
    """That of the objective which fits the rows; of the default one where there are none to look at."""
    return objective_class(look.objective if look else DEFAULT_METHOD["objective"]).first_recipe


def proposed_objectives() -> list[type[ObjectiveSettings]]:
    """The settings classes of the objectives that rows are tried for, in order."""
    known = [each for each in map(objective_class, known_names("objectives")) if each.first_recipe.order is not None]
    return sorted(known, key=lambda each: each.first_recipe.order or 0)


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
    if not 0 <= value < 1:
        raise InputError(f"'{text}' is no share of the rows", "give a number from 0 to 0.5, such as 0.05")
    return value


def models_at_hand() -> list[str]:
    """Hub names whose files lie in the hub's cache, the newest first."""
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    folders = Path(hub).expanduser().glob("models--*--*")
    complete = [folder for folder in folders if any(folder.glob("snapshots/*/config.json"))]
    complete.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in complete]


def look_at(data: str) -> Look | None:
    """What the first rows of a file are like; None of a name on the hub, whose rows are not here.

    Raises: DataError where it cannot be read or is of no known format.
    """
    if not Path(data).exists():
        if data.count("/") == 1 and not data.startswith((".", "/", "~")) and not Path(data).suffix:
            return None
        how = "name your rows: JSONL, JSON, CSV, Parquet, text, or a folder of files"
        raise DataError(f"there is no file {data}", how)
    problems = Problems()
    rows = read_source(Source(path=str(Path(data).absolute())), problems)
    values = [row.values for row in islice(rows, LOOKED_AT + 1)]
    problems.raise_if_any()
    if not values:
        raise DataError("there is no row in it", "", file=data)
    objective, format_name, columns = _kind(values[0], data)
    method, seen = objective.model_fields["method"].default, values[:LOOKED_AT]
    sizes = sorted(sum(map(len, _texts(row))) for row in seen)
    longest = int(sizes[min(int(len(sizes) * SHARE_KEPT), len(sizes) - 1)] / CHARACTERS_OF_A_TOKEN) + 32
    fields = tuple(name for name, _ in Counter(name for row in seen for name in row).most_common(6))
    notes = _label_notes(seen) if format_name == "text" else _folder_notes(data)
    return Look(method, format_name, len(seen), seen == values, longest, fields, columns, notes)


def _names(kind: str, value: object) -> bool:
    """Whether it is a file of this kind, or holds one: a recording or an image."""
    if isinstance(value, Mapping):
        return "bytes" in value and is_media(str(value.get("path") or f"x{MEDIA[kind][0]}"), kind)
    return isinstance(value, str) and is_media(value, kind)


def _label_notes(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Of a column beside the text that has few values, each of them in many rows: it may be what is to be learnt."""
    notes = []
    for name in (name for name in rows[0] if name != "text"):
        short = all(isinstance(row.get(name), str | int) and len(str(row[name])) <= LONGEST_LABEL for row in rows)
        if short and 2 <= (count := len({row[name] for row in rows})) <= len(rows) // ROWS_OF_A_LABEL:
            notes.append(
                f"{name} has {count} values: to learn them instead of the text, write objective: classify, and as "
                f"data.train {{path: ..., format: labels, columns: {{{name}: label}}}}"
            )
    return notes


def _folder_notes(data: str) -> list[str]:
    """Of a folder without a table: files of it that are no rows."""
    others = passed_over(Path(data)) if is_folder(with_table(Source(path=str(Path(data).absolute()))).path) else None
    return [] if others is None else [others]


def _kind(row: dict[str, object], data: str) -> tuple[type[ObjectiveSettings], str, Mapping[str, str]]:
    """The settings class of the objective that fits a row, the row's format, and the columns to rename for it.

    Raises: DataError naming the fields of every format.
    """
    medium = next((kind for kind in ("audio", "image") if any(_names(kind, value) for value in row.values())), None)
    folder, lacks = bool(medium and medium in row), list[str]()
    known = proposed_objectives()
    for objective in known:
        if objective.medium != medium and (objective.medium or folder):  # of a folder of files no text is to be learnt
            continue
        try:
            return objective, choose_format("auto", row, objective.example)[0], {}
        except DataError as error:
            last, lacks = error, [*lacks, error.problems[0].how]
    if columns := columns_meant(row):
        example = facts_of("formats", QUESTIONS_FORMAT).EXAMPLE
        return next(each for each in known if each.example == example), QUESTIONS_FORMAT, columns
    problem = last.problems[0]
    raise DataError(problem.what, "; or ".join(lacks) if folder else problem.how, file=data, line=1)


def _texts(value: object) -> Iterator[str]:
    """Every text in a row."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def recipe_text(wanted: Wanted, target: Path) -> str:
    """The recipe with what each key means beside it."""
    look, first, adapter = wanted.look, _first_recipe(wanted.look), wanted.adapter
    length = next((size for size in LENGTHS if size >= look.longest), LENGTHS[-1]) if look else 2048
    few = look is not None and look.complete and look.rows < FEW_ROWS
    steps = 2 if few else 8
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
        *([] if media else [(f"  max_length: {length}", "tokens; longer rows are dropped, and told")]),
        ("adapter:", ""),
        (f"  method: {wanted.method}", "every weight of the base is trained" if adapter.trains_base else ""),
        *method,
        *(chosen if media else [(f"objective: {objective}", "")]),
        ("training:", ""),
        (f"  learning_rate: {FULL_RATE if adapter.trains_base else first.learning_rate}", RATE_COMMENT),
        *epochs,
        *first.training,
        ("  micro_batch_size: 2", "rows at once: memory, speed, not the result"),
        (f"  gradient_accumulation_steps: {steps}", f"2 x {steps} rows make one step"),
        ("  eval_steps: 50", ""),
        ("  save_steps: 50", "tunekit train --resume goes on from there"),
        ("output:", ""),
        (f"  dir: runs/{target.stem if target.stem != 'recipe' else 'first'}", ""),
    ]
    commented = (f"{text:<34} # {comment}" if comment else text for text, comment in lines)
    return "".join(f"\n{line}\n" if line[0].isalpha() else f"{line}\n" for line in commented)  # a gap before a section


def _source_lines(data: str, look: Look | None) -> list[Line]:
    """data.train: a name, and how its columns are renamed where they are."""
    said = "a file (JSONL, CSV ...) or a hub data set"
    if look and (medium := look.settings.medium):
        said = f"a folder of {ROWS_NAME[medium]}s, a table that names them (JSONL, CSV ...), or a hub data set"
    if not (look and look.columns):
        return [(f"  train: {_quoted(data)}", said)]
    columns = ", ".join(f"{column}: {field}" for column, field in look.columns.items())
    return [
        ("  train:", ""),
        (f"    path: {_quoted(data)}", said),
        (f"    columns: {{{columns}}}", "the file's column: the format's field"),
    ]


def _evaluation_said(look: Look | None, data: str) -> str:
    """Beside data.eval."""
    if look is None or not look.settings.measures_training:
        return "a share of the rows, or a file"
    return f"[{_quoted(data)}] measures these images themselves, at fixed noise: whether the loss falls"


def _beside(name: str, target: Path) -> str:
    """A local path as the recipe's folder sees it; another name as it is."""
    return os.path.relpath(name, target.absolute().parent) if Path(name).exists() else name


def _quoted(text: str) -> str:
    """As YAML reads it back."""
    plain = all(letter.isalnum() or letter in "/._-" for letter in text) and text[:1] not in ("", "_", "-")
    return text if plain else "'" + text.replace("'", "''") + "'"


def fitted(wanted: Wanted, target: Path) -> tuple[Wanted, Sequence[str]]:
    """The recipe again with a smaller base where its plan does not fit this machine, and what was found.

    Raises: TunekitError where the recipe cannot be planned for a reason that is not memory or an absent model.
    """
    from tunekit.recipe.load import load_recipe

    load_recipe(target)
    if not Path(wanted.model).exists() and wanted.model not in models_at_hand():
        return wanted, [f"{wanted.model} is not here yet: the first run fetches it, and `tunekit plan` asks the hub"]
    from tunekit.machine.devices import make_devices
    from tunekit.machine.memory import available_bytes
    from tunekit.planning.plan import make_plan

    devices = make_devices()
    free = available_bytes(devices.device)
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
    rows = plan.rows.training
    if rows.dropped:
        said.append(f"{rows.dropped:,} of {rows.read:,} rows are dropped: " + ", ".join(rows.dropped_reasons))
    if not fits:
        said.append("warning: that does not fit; set memory.budget, and plan finds a way or says why there is none")
    return wanted, [*said, *(f"warning: {text}" for text in refused)]
