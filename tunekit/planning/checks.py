"""Why a recipe is refused: the checks before a run starts, listed one per line. plan.json has their problems in this
order. Below the lists are the code of most checks, and how problems are collected.

Checks elsewhere: of the recipe's keys in recipe/load.py (`make_recipe`); of what cannot be read in prepare.py; of
memory in memory.py and tiers.py; of initialisations, kernels and rows near what they check.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from tunekit.adapters.method import load_method
from tunekit.artifacts.run import holds_sweep
from tunekit.contracts import Processor, RowKind
from tunekit.data.rows import RowSet
from tunekit.errors import Problem, RecipeError, ResourceError, TunekitError
from tunekit.evaluation.tasks.run import NO_TEMPLATE, TEMPLATE_KEY
from tunekit.machine.devices import capability, kind_of
from tunekit.model.attention.documents import may_be_packed
from tunekit.model.families import make_family, text_config
from tunekit.model.families.routers import router_problems
from tunekit.model.load import LoadedModel
from tunekit.model.parts import parts_apart
from tunekit.model.quantized.codec import FOUR_BIT
from tunekit.model.quantized.fp8 import CAPABILITY
from tunekit.model.text.slots import has_recurrent_state
from tunekit.planning.initialisation import continued_problems, initialisation_problems
from tunekit.planning.kernels import kernel_problems
from tunekit.planning.prepared import Prepared
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.reading.names import facts_of
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.recipe.recipe import Recipe
from tunekit.recipe.training import BITSANDBYTES_OPTIMIZERS
from tunekit.records import ExecutionSettings, Plan, Refusal
from tunekit.tuned.fit import row_problems


def recipe_checks(recipe: Recipe, device: torch.device, *, check_folder: bool, resumed: bool) -> Iterator[Problem]:
    """Checks that read neither the model nor the data."""
    yield from refuse_unsupported(recipe)
    yield from library_problems(recipe)
    yield from device_problems(recipe, device)
    if check_folder:
        yield from folder_problems(recipe)
    if not resumed:  # a run or a sweep of an older version can be resumed
        yield from step_problems(recipe)


def run_checks(prepared: Prepared, *, resumed: bool) -> Iterator[Problem]:
    """Checks of model, data and adapter together."""
    adapter, objective = prepared.recipe.adapter, prepared.rows.objective
    base, context = prepared.base, prepared.context
    yield from row_problems(base, context.processor, objective.rows, context.rows, context.virtual_tokens)
    yield from initialisation_problems(adapter, base, context.targets)
    yield from router_problems(base, prepared.recipe.training.router_loss)
    yield from part_problems(prepared.recipe, base)
    yield from image_problems(prepared.recipe, base, prepared.rows)
    yield from fixed_rows_problems(prepared.recipe, objective.rows)
    if not resumed:  # the state of a resumed run is in its checkpoint
        yield from continued_problems(adapter, base, context.targets)


def execution_checks(prepared: Prepared, execution: ExecutionSettings) -> Iterator[Problem]:
    """Checks of the settings that the recipe or an earlier decision fixes."""
    adapter, device = prepared.recipe.adapter, prepared.resources.device
    method = load_method(adapter.method)
    for conflict in method.run_conflicts(adapter, prepared.steps.count):
        yield Problem(conflict.what, conflict.how, key=f"adapter.{conflict.key}")
    yield from kernel_problems(execution.kernels, device)


Made = TypeVar("Made")
LINEAR_KINDS = ("linear_attention", "mamba", "conv", "recurrent")  # stateful layers in a configuration's layer_types
TASKS = "evaluation.tasks"


def library_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yields a problem for each library that the recipe needs and that is not installed."""
    if find_spec("bitsandbytes") is None:
        free = ("none", "int8_weight_only", "fp8", *FOUR_BIT)
        if recipe.model.quantization not in free:
            how = f"run: pip install bitsandbytes, or write {', '.join(free[1:])} or none"
            yield Problem(f"{recipe.model.quantization} needs bitsandbytes", how, key="model.quantization")
        if recipe.training.optimizer in BITSANDBYTES_OPTIMIZERS:
            how = "run: pip install bitsandbytes, or write adamw"
            yield Problem(f"{recipe.training.optimizer} needs bitsandbytes", how, key="training.optimizer")
    for tracker in recipe.output.report_to:
        modules = (tracker, "tensorboardX") if tracker == "tensorboard" else (tracker,)
        if not any(map(find_spec, modules)):
            yield Problem(f"{tracker} is not installed", f"run: pip install {tracker}", key="output.report_to")
    for name in recipe.evaluation.metrics:
        module, package = getattr(facts_of("metrics", name), "LIBRARY", (None, ""))
        if module is not None and find_spec(module) is None:
            what = f"{name} needs {module}, which is not installed"
            yield Problem(what, f"run: pip install '{package}'", key="evaluation.metrics")
    if recipe.evaluation.tasks and find_spec("lm_eval") is None:
        yield Problem("tasks need lm-eval, which is not installed", "run: pip install 'tunekit[evals]'", key=TASKS)
    family = make_family(recipe.objective.family)
    if recipe.evaluation.tasks and (not family.answers or family.reads_source or not family.reads_ids):
        yield Problem(
            f"tasks need a causal language model, but this is {family.text}", "remove evaluation.tasks", key=TASKS
        )


def part_problems(recipe: Recipe, base: LoadedModel) -> Iterator[Problem]:
    """Yields a problem if the adapter is wanted in parts of the base that get no gradient from the rows."""
    others = [part for part in recipe.adapter.parts if part != "language"]
    if others:
        why = "the rows are text alone, so that they give it no gradient"
        why = "rows with images only train the language model so far" if base.family.frozen_parts(base.net) else why
        why = why if parts_apart(base.net) else f"{base.facts.name_or_path} has no such part"
        yield Problem(f"{others[0]} cannot be trained: {why}", "write parts: [language]", key="adapter.parts")


def image_problems(recipe: Recipe, base: LoadedModel, rows: RowSet) -> Iterator[Problem]:
    """Yields a problem for each setting that rows with images do not support."""
    if not rows.objective.facts.get("images"):
        if recipe.data.image_tokens != "auto":
            what = "no row has images that this objective reads"
            yield Problem(f"{what}, so it has no effect", "leave the key out", key="data.image_tokens")
        return
    if load_method(recipe.adapter.method).model is not None and not recipe.adapter.trains_base:
        what = f"{recipe.adapter.method} adds vectors to the sequence, which would move the places of images"
        yield Problem(what, "choose a method that adapts layers, for example lora", key="adapter.method")
    if rows.streams:
        what = "a training source is streamed, and streamed rows cannot have images"
        yield Problem(what, "use files that fit into memory, or remove the images", key="data.train")


def template_problems(recipe: Recipe, processor: Processor, template: str | None) -> Iterator[Problem]:
    """Yields a problem if tasks need chat prompts, but the tokenizer has no chat template."""
    text, settings = processor.tokenizer, recipe.evaluation
    if settings.tasks and settings.task_chat_template and text and (template or text.chat_template) is None:
        yield Problem(*NO_TEMPLATE, key=TEMPLATE_KEY)


def device_problems(recipe: Recipe, device: torch.device) -> Iterator[Problem]:
    """Yields a problem for each setting that the device does not support."""
    if recipe.model.quantization == "fp8" and device.type != "cpu" and capability(device) < CAPABILITY:
        what = (
            "this device has no float8 products; fp8 needs an NVIDIA GPU of compute capability "
            f"{'.'.join(map(str, CAPABILITY))} or more"
        )
        yield Problem(what, "write quantization: nf4 or int8_weight_only", key="model.quantization")
    if kind_of(device).bitsandbytes:
        return
    if recipe.model.quantization == "int8":
        what = f"int8 is computed by bitsandbytes, which has no kernels for {device.type}"
        yield Problem(what, "write quantization: int8_weight_only", key="model.quantization")
    if recipe.training.optimizer in BITSANDBYTES_OPTIMIZERS:
        what = f"{recipe.training.optimizer} is computed by bitsandbytes, which has no kernels for {device.type}"
        yield Problem(what, "write optimizer: adamw", key="training.optimizer")


def step_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yields a problem if a step has too few rows for the objective."""
    training, reason = recipe.training, recipe.objective.single_row
    if reason and training.micro_batch_size == 1 and training.gradient_accumulation_steps == 1:
        how = "write a larger number here, or a larger training.gradient_accumulation_steps"
        yield Problem(f"a step has one row, but {reason}", how, key="training.micro_batch_size")


def fixed_rows_problems(recipe: Recipe, kind: RowKind) -> Iterator[Problem]:
    """Yields a problem if the number of rows of a step depends on their lengths, but the loss compares these rows."""
    if kind.layout.distinct is not None and recipe.training.micro_batch_tokens is not None:
        what = "the loss compares all rows of a step, but micro_batch_tokens fixes no number of rows"
        yield Problem(what, "write training.micro_batch_size instead", key="training.micro_batch_tokens")


def folder_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yields a problem if `train` could not start in output.dir. No file is written."""
    path = Path(recipe.output.dir)
    key = "output.dir"
    if path.exists() and not path.is_dir():
        yield Problem(f"{path} is not a folder", "choose another output.dir", key=key)
        return
    for name in ("plan.json", "checkpoints"):
        if (path / name).exists():
            how = "continue it with `tunekit train RECIPE --resume`, or move it aside with --overwrite"
            yield Problem(f"{path} already holds a run ({name})", how, key=key)
            return
    if holds_sweep(path):
        yield Problem(f"{path} already holds a sweep", "choose another output.dir", key=key)
        return
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Problem(
            f"{existing} cannot be written to", "choose another output.dir, or change its permissions", key=key
        )


def learned_length(base: LoadedModel, virtual_tokens: int) -> int | None:
    """The maximum number of tokens of a row in a base with learned position embeddings, without the adapter's virtual
    tokens. None if positions are computed, or if the base reads no text."""
    positions = None if base.text is None else base.family.learned_positions(base.net)
    return None if positions is None else max(positions - virtual_tokens, 1)


def packing_obstacle(base: LoadedModel, kind: RowKind, whole_model_adapter: bool) -> str | None:
    """The reason why rows cannot be packed; None if they can be."""
    config = text_config(base.net)
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    if not kind.packable:
        return kind.unpackable
    if kind.layout.paired:
        return "rows with pairs of sequences cannot be packed; they are put end to end anyway, if the model allows it"
    if whole_model_adapter:
        return "the adapter puts virtual tokens before each row"
    if not base.family.takes_positions(base.net):
        return f"{config.model_type} takes no position ids, so packed rows would attend to each other"
    if has_recurrent_state(base.net) or any(kind in name for name in kinds for kind in LINEAR_KINDS):
        return f"{config.model_type} carries a state from token to token, so packed rows would affect each other"
    if not may_be_packed(base.net):
        return f"{config.model_type} computes its mask without positions, so packed rows would attend to each other"
    return None


class Findings:
    """The problems of a run. `prepare` adds all problems here."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._loaded = loaded
        self.problems: list[Problem] = []
        self.errors: list[TunekitError] = []

    def add(self, problems: Iterable[Problem]) -> None:
        """Add problems."""
        self.problems += located(self._loaded, problems)

    def attempt(self, work: Callable[..., Made], *values: object, **named: object) -> Made | None:
        """Call `work` with these values and return its result. If it raises an error, add the error's problems and
        return None. If a value is None, because an earlier attempt failed, return None at once."""
        if any(value is None for value in values):
            return None
        try:
            return work(*values, **named)
        except TunekitError as error:
            self.errors.append(error)
            self.add(error.problems)
            return None

    def error(self) -> TunekitError:
        """One error with all problems. If all raised errors have the same class, it has this class too; otherwise it is
        a RecipeError."""
        kinds = {type(error) for error in self.errors}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        return kind.of(self.problems)


def located(loaded: LoadedRecipe, problems: Iterable[Problem]) -> list[Problem]:
    """The problems. One without a file gets the recipe's file and line."""
    return [loaded.locate(problem) if problem.file is None else problem for problem in problems]


def refusals_of(loaded: LoadedRecipe, problems: Iterable[Problem], kind: type[TunekitError]) -> Iterator[Refusal]:
    """The problems as values for `plan.refusals`. `kind`: the error whose exit code they have; it is ResourceError if
    memory is too small."""
    for problem in located(loaded, problems):
        message = f"{problem.what}; {problem.how}" if problem.how else problem.what
        yield Refusal(problem.key or "", problem.line, message, problem.file, kind.exit_code)


def raise_refusals(plan: Plan) -> None:
    """Raises: RecipeError with all refusals of the plan; ResourceError if all of them are about memory. Does nothing if
    the plan has no refusals."""
    if not plan.refusals:
        return
    kinds = {refusal.exit_code for refusal in plan.refusals}
    kind: type[TunekitError] = ResourceError if kinds == {ResourceError.exit_code} else RecipeError
    raise kind.of([Problem(refusal.message, "", refusal.file, refusal.line, refusal.key) for refusal in plan.refusals])
