"""The text of a first recipe, with a comment after each key. `tunekit init` writes it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tunekit.data.looking.first_look import LABELS_FORMAT, ROWS_NAME, Look
from tunekit.data.reading.several import is_pattern
from tunekit.data.reading.source import rename_columns
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.bases.section import AdapterSettings, Line, ObjectiveSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.dump import yaml_scalar
from tunekit.recipe.reading.first_values import FirstValues, first_values
from tunekit.recipe.reading.names import adapter_class, objective_class, unmeasurable
from tunekit.recipe.reading.shipped import SCHEMA_LINE, shipped_recipes
from tunekit.recipe.recipe import DEFAULT_METHOD, Recipe
from tunekit.recipe.training import TrainingSection

IMAGES_RECIPE = "vision-lora"  # for conversations with images
FEW_ROWS = 1000
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
OF_LABELS = "the type of the labels in the data"
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
    limits_images: bool = True  # whether the base's processor has a setting for the proposed limit of an image
    base: str = ""  # encoder or decoder, once the base is read

    @property
    def adapter(self) -> type[AdapterSettings]:
        """The settings class of the method."""
        return adapter_class(self.method)

    @property
    def objective(self) -> type[ObjectiveSettings]:
        """The settings class of the objective."""
        return objective_of(self.look)

    @property
    def measured(self) -> FirstValues | None:
        """The values of training that were measured for such a run, or None."""
        name = " ".join([self.objective.model_fields["method"].default, *self.needed.values()])
        return first_values(name, self.method, self.base)

    @property
    def rows(self) -> list[Mapping[str, object]]:
        """The sample of rows, with the fields of their format."""
        look = self.look
        return [] if look is None else [rename_columns(dict(row), dict(look.columns)) for row in look.sample]

    @property
    def needed(self) -> Mapping[str, str]:
        """The keys of the objective that the type of the labels needs."""
        return self.objective.for_rows(self.rows) if self.look else {}

    @property
    def reasons(self) -> list[str]:
        """Why the rows need these keys of the objective, where the objective states it."""
        reasons = self.objective.first_reasons
        return [
            f"objective.{key}: {value}, for {reasons[value]}" for key, value in self.needed.items() if value in reasons
        ]

    @property
    def steps(self) -> int:
        """The measured number of steps for these rows and labels."""
        assert self.measured is not None
        return self.measured.steps(self.training_rows, len({str(row.get("label")) for row in self.rows}))

    @property
    def training_rows(self) -> int:
        """The number of rows or pieces of text to train on."""
        rows = 0 if self.look is None else self.look.rows
        pieces = self.look.longest // SPLIT_LENGTH if self.look is not None and is_split(self.look) else 0
        return round(max(rows, pieces) * (1 - self.evaluation))

    @property
    def length(self) -> int:
        """The value of data.max_length: the smallest of LENGTHS in which the rows fit, but at most the model's number
        of positions."""
        look, usual = self.look, 2048
        if look is not None:
            fitting = next((size for size in LENGTHS if size >= look.longest), LENGTHS[-1])
            usual = SPLIT_LENGTH if is_split(look) else fitting
        return usual if self.positions is None else min(usual, self.positions)

    @property
    def example(self) -> Recipe | None:
        """The shipped recipe with the base, target modules and learning rate for this objective; None for objectives on
        text."""
        return example_of(self.objective)


def objective_of(look: Look | None) -> type[ObjectiveSettings]:
    """The objective that fits the rows; without rows, the default objective."""
    return objective_class(look.objective if look else DEFAULT_METHOD["objective"])


@cache
def example_of(objective: type[ObjectiveSettings]) -> Recipe | None:
    """The shipped recipe of an objective on recordings or images, because the base models of these objectives differ
    too much for common defaults; None for objectives on text."""
    name = f"{objective.model_fields['method'].default.replace('_', '-')}-{DEFAULT_METHOD['adapter']}"
    return None if objective.medium is None else load_recipe(shipped_recipes()[name]).recipe


def base_of(look: Look | None) -> str | None:
    """The base of the shipped recipe for rows with recordings or images; None for rows of text, which most bases
    read."""
    if look is not None and look.has_images:
        return load_recipe(shipped_recipes()[IMAGES_RECIPE]).recipe.model.name_or_path
    objective = objective_of(look)
    if objective.first_recipe is not None:
        return load_recipe(shipped_recipes()[objective.first_recipe]).recipe.model.name_or_path
    example = example_of(objective)
    return None if example is None else example.model.name_or_path


def recipe_text(first: FirstRecipe, target: Path) -> str:
    """The text of the recipe, with a comment after each key."""
    look, adapter, objective, example = first.look, first.adapter, first.objective, first.example
    split = look is not None and is_split(look)
    length_comment = LENGTH_COMMENT[split] if first.positions is None or split else POSITIONS_COMMENT
    few = look is not None and look.complete and look.rows < FEW_ROWS and not split
    rows, accumulation = objective.first_rows or (2, 2 if few else 8)
    epochs, values = 3 if few else 1, first.measured
    total = epochs * first.training_rows / (rows * accumulation)
    length_of_run = [(f"  epochs: {epochs}", "")]
    if values:
        rows, accumulation, total = values.rows_per_step, 1, first.steps
        length_of_run = [(f"  max_steps: {total}", _steps_comment(total * rows / max(first.training_rows, 1)))]
    elif example and example.training.max_steps:
        keys, total = ("scheduler", "warmup_steps", "max_steps"), example.training.max_steps
        length_of_run = [(f"  {key}: {getattr(example.training, key)}", "") for key in keys]
    interval = MOST_STEPS if look is None else min(max(round(total / EVALUATIONS), 1), MOST_STEPS)
    data, model = (_beside(name, target) for name in (first.data, first.model))
    draws = first.quantization == "none" and objective.shows.draws  # quantization is not offered for image generation
    method, name = [*adapter.first_lines], objective.model_fields["method"].default
    if method and example:
        method.append((f"  target_modules: [{', '.join(example.adapter.model_dump()['target_modules'])}]", ""))
    needed = first.needed
    chosen = [("objective:", ""), (f"  method: {name}", ""), *objective.first_lines]
    chosen += [(f"  {key}: {value}", objective.first_reasons.get(value, OF_LABELS)) for key, value in needed.items()]
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
        *_image_lines(first),
        ("adapter:", ""),
        (f"  method: {first.method}", "every weight of the base is trained" if adapter.trains_base else ""),
        *method,
        *(chosen if example or needed else [(f"objective: {name}", "")]),
        ("training:", ""),
        (f"  learning_rate: {_rate_text(first_rate(first))}", RATE_COMMENT),
        *length_of_run,
        (f"  micro_batch_size: {rows}", "rows computed together: affects memory and speed, not the result"),
        (f"  gradient_accumulation_steps: {accumulation}", f"one step trains on {rows} x {accumulation} rows"),
        *([(f"  eval_steps: {interval}", "")] if first.evaluation else []),
        (f"  save_steps: {interval}", "tunekit train --resume continues from the last checkpoint"),
        *(_evaluation_lines(objective, needed) if first.evaluation else []),
        ("output:", ""),
        (f"  dir: {yaml_scalar(f'runs/{target.stem}' if target.stem != 'recipe' else 'runs/first')}", ""),
    ]
    commented = (f"{text:<34} # {comment}" if comment else text for text, comment in lines)
    return "".join(f"\n{line}\n" if line[0].isalpha() else f"{line}\n" for line in commented)  # a gap before a section


def is_split(look: Look) -> bool:
    """Whether the texts are so long that the recipe splits them into pieces."""
    return look.format_name == "text" and look.longest > LENGTHS[-1]


def _steps_comment(epochs: float) -> str:
    """How the number of steps follows from the rows."""
    seen = f"{epochs:.0f} epochs" if epochs >= 2 else f"{epochs:.2g} epochs: more steps may help"
    return f"{seen}; measured: tunekit init --show-rules"


def _evaluation_lines(objective: type[ObjectiveSettings], needed: Mapping[str, str]) -> list[Line]:
    metric = objective.first_metric(needed)
    best = (f"  best: eval.{metric or 'loss'}", "the checkpoint to export; the last checkpoint may be overfitted")
    if metric is not None:
        return [("evaluation:", ""), (f"  metrics: [loss, {metric}]", ""), best]
    answers = SAMPLED_ANSWERS if objective.medium is None else ()
    named = NUMBER_METRICS if unmeasurable("accuracy", objective, needed, chosen=False) else LABEL_METRICS
    return [("evaluation:", ""), best, *(named if objective.names_labels else answers)]


def first_rate(first: FirstRecipe) -> float:
    """The learning rate of the first recipe: the rate published for the objective, or else for the method, or else the
    default."""
    adapter, objective, example = first.adapter, first.objective, first.example
    published = objective.default_learning_rate or (None if adapter.trains_base else adapter.default_learning_rate)
    usual = TrainingSection.model_fields["learning_rate"].default if published is None else published.value
    usual = usual if first.measured is None else first.measured.learning_rate
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


def _image_lines(first: FirstRecipe) -> list[Line]:
    """The line of data.image_tokens for conversations with images."""
    limit = 0 if first.look is None else first.look.image_tokens
    comment = "maximum tokens of an image: the data's largest image, but at most a million pixels"
    return [(f"  image_tokens: {limit}", comment)] if limit and first.limits_images else []


def _evaluation_said(look: Look | None, data: str) -> str:
    """The comment for the key data.eval."""
    if look is None or not look.settings.measures_training:
        return "a share of the rows, or a file"
    return f"write [{yaml_scalar(data)}] to measure the loss on the training images, with fixed noise"


def _beside(name: str, target: Path) -> str:
    """A local path or pattern, made relative to the recipe's folder; a hub name stays unchanged."""
    is_local = Path(name).exists() or is_pattern(os.path.abspath(name))
    return relative_to(name, target.absolute().parent) if is_local else name
