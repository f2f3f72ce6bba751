"""Problems that would make a run fail, which checks.py lists, and notes about surprising behaviour. Both are found
before weights are loaded."""

import os
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from tunekit.adapters.method import load_method
from tunekit.artifacts.run import holds_sweep
from tunekit.contracts import Processor, RowKind
from tunekit.data.batching.steps import dealt
from tunekit.data.rows import RowSet
from tunekit.errors import Problem
from tunekit.evaluation.tasks.run import NO_TEMPLATE, TEMPLATE_KEY
from tunekit.machine.devices import capability, kind_of
from tunekit.machine.threads import processors
from tunekit.model.attention.documents import may_be_packed
from tunekit.model.compute import computes_bfloat16
from tunekit.model.families import make_family, text_config
from tunekit.model.load import LoadedModel
from tunekit.model.parts import parts_apart
from tunekit.model.quantized.codec import FOUR_BIT
from tunekit.model.quantized.fp8 import CAPABILITY, computes_fp8
from tunekit.model.text.slots import shared_length
from tunekit.recipe.reading.names import facts_of
from tunekit.recipe.recipe import Recipe
from tunekit.recipe.training import BITSANDBYTES_OPTIMIZERS, TrainingSection
from tunekit.records import ExecutionSettings
from tunekit.training.schedules import rate_multiplier, warmup_steps
from tunekit.tuned.fit import longest_tokens

HIGHEST_RATE = 0.3  # the learning rate of prompt tuning in Lester et al. 2021; other methods need far less
LINEAR_KINDS = ("linear_attention", "mamba", "conv", "recurrent")  # stateful layers in a configuration's layer_types
TASKS = "evaluation.tasks"
RATE_STEPS = 1000  # the learning rates of longer runs never sum to nearly 0
LEAST_RATES = 0.1
BUSY_SHARE = 0.9  # of the time; below it, a note says that processes wait for each other


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


def position_notes(base: LoadedModel, rows: RowSet, virtual_tokens: int) -> Iterator[str]:
    """A warning if rows are longer than the rows that the model was trained with. Not for learned positions: there such
    rows are refused. Also a note if long rows change the positions of shorter ones."""
    longest = max(longest_tokens(some, rows.objective.rows.layout) for some in rows.all) + virtual_tokens
    trained = getattr(text_config(base.net), "max_position_embeddings", None)
    if isinstance(trained, int) and longest > trained and base.family.learned_positions(base.net) is None:
        yield (
            f"warning: the longest row has {longest} tokens, but the model was made for at most {trained}; "
            "longer rows may give bad results"
        )
    limit = shared_length(base)
    if limit is not None and longest > limit:
        yield (
            f"in a micro-batch with a row of more than {limit:,} tokens, this base rotates all rows by the factors for "
            "long rows, as in transformers; so the size of micro-batches changes losses, also those of evaluations"
        )


def learned_length(base: LoadedModel, virtual_tokens: int) -> int | None:
    """The maximum number of tokens of a row in a base with learned position embeddings, without the adapter's virtual
    tokens. None if positions are computed, or if the base reads no text."""
    positions = None if base.text is None else base.family.learned_positions(base.net)
    return None if positions is None else max(positions - virtual_tokens, 1)


def rate_notes(training: TrainingSection, steps: int) -> Iterator[str]:
    """Warnings about a very high learning rate, and about learning rates that are nearly 0 in the whole run.

    The latter happens in short runs, because a warm-up starts with the rate 0.
    """
    highest = max(training.learning_rate, training.head_learning_rate or 0.0)
    if highest > HIGHEST_RATE:
        yield (
            f"warning: a learning rate of {highest:g} is very high: AdamW changes each parameter by "
            "about this amount in every step; 1e-5 to 1e-2 are usual"
        )
    warmup = warmup_steps(training, steps)
    total = sum(rate_multiplier(training, step, steps, warmup) for step in range(min(steps, RATE_STEPS)))
    if total < LEAST_RATES:
        yield (
            f"warning: the learning rates of all {steps:,} steps add up to only {total:.2g} times "
            "training.learning_rate, so the run learns almost nothing; set more steps, or training.warmup_steps: 0"
        )


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
    if getattr(base.net, "_is_stateful", False) or any(kind in name for name in kinds for kind in LINEAR_KINDS):
        return f"{config.model_type} carries a state from token to token, so packed rows would affect each other"
    if not may_be_packed(base.net):
        return f"{config.model_type} computes its mask without positions, so packed rows would attend to each other"
    return None


def rank_notes(recipe: Recipe, execution: ExecutionSettings) -> Iterator[str]:
    """Notes about a number of processes that does not suit the recipe: lists that have not one entry for each process,
    tasks, and steps whose micro-batches leave processes without work."""
    ranks, count = execution.shares, execution.gradient_accumulation_steps
    budget, speeds = recipe.memory.budget, recipe.training.rank_speeds
    if isinstance(budget, tuple) and len(budget) != ranks:
        yield f"memory.budget has {len(budget)} sizes, but the run has {_processes(ranks)}: the smallest size counts"
    if speeds is not None and len(speeds) != ranks:
        yield f"training.rank_speeds has {len(speeds)} numbers, but the run has {_processes(ranks)}: no effect"
    if recipe.evaluation.tasks and ranks > 1:
        command = shlex.join(["tunekit", "eval", recipe.output.dir, "--tasks", ",".join(recipe.evaluation.tasks)])
        yield f"a run of several processes does not compute evaluation.tasks; compute them after it with: {command}"
    unequal = speeds if speeds is not None and len(speeds) == ranks else ()
    seconds = [len(dealt(count, rank, ranks, unequal)) / (unequal[rank] if unequal else 1) for rank in range(ranks)]
    busy = sum(seconds) / (ranks * max(seconds))  # of the time, if all micro-batches are equally large
    if busy < BUSY_SHARE:
        batches, size = "micro-batch" if count == 1 else "micro-batches", recipe.training.micro_batch_tokens
        yield (
            f"each step has {count} {batches} for {ranks} processes, so they are idle {min(1 - busy, 0.99):.0%} of the "
            f"time; choose {'a larger number' if unequal else f'a multiple of {ranks}'} for training."
            f"gradient_accumulation_steps, with a smaller training.micro_batch_{'size' if size is None else 'tokens'}"
        )


def _processes(ranks: int) -> str:
    return "1 process" if ranks == 1 else f"{ranks} processes"


def run_notes(recipe: Recipe, base: LoadedModel, device: torch.device) -> Iterator[str]:
    """Notes about the device and the precision: when the host waits for the device, which results are approximate, and
    which settings have no effect."""
    training = recipe.training
    shares = [module.p for module in base.net.modules() if isinstance(module, nn.Dropout)]
    if max(shares, default=0.0) > 0 or getattr(recipe.adapter, "dropout", 0.0) > 0:
        yield "dropout is on: with another micro-batch size, masks and losses differ slightly"
    if training.optimizer != "adamw":
        yield f"{training.optimizer}: before each update, the host waits for the device and checks the gradients"
    elif base.dtype == torch.float16:
        yield "float16: before each update, the host waits for the device and checks whether gradients overflow"
    if base.dtype == torch.float16 and recipe.model.dtype == "auto":
        yield (
            "model.dtype: auto is float16 with a loss scale, because this device does not compute bfloat16 natively; "
            "set model.dtype: float32 if the model's numbers are too large for float16"
        )
    if base.dtype == torch.bfloat16 and not computes_bfloat16(device):
        yield (
            "model.dtype bfloat16: this processor has no bfloat16 instructions, so products take several times longer "
            "than in float32; write dtype: auto, unless float32 needs too much memory"
        )
    if training.optimizer.startswith("paged") and device.type == "cpu":
        yield f"{training.optimizer}: paging has no effect on a CPU"
    if recipe.model.quantization == "fp8":
        slow = "" if computes_fp8(device) else "; torch's float8 product does not work on this device, so fp8 is slow"
        yield f"warning: fp8 is approximate: weights and inputs of linear layers are rounded to 8 bits{slow}"
    if recipe.model.quantization in FOUR_BIT and device.type != "cpu":
        lacks = "" if find_spec("bitsandbytes") else "bitsandbytes is not installed"
        lacks = lacks if kind_of(device).bitsandbytes else f"bitsandbytes has no kernels for {device.type}"
        if lacks:
            yield f"{lacks}, so torch unpacks the 4-bit weights: the results are the same, but the run is slower"
    if training.deterministic and device.type == "cpu":
        yield "training.deterministic has no effect: a CPU's kernels always add in a fixed order"
    if training.threads is not None and device.type != "cpu":
        yield "training.threads has little effect, because the run computes on the accelerator"
    elif isinstance(training.threads, int) and training.threads > processors():
        yield (
            f"training.threads: {training.threads:,} is more than the {processors():,} processors that this process "
            "may use, so threads wait for each other"
        )
    if training.deterministic and device.type == "mps":
        yield (
            "training.deterministic: torch has no deterministic kernels for Metal; results of a resumed run may differ "
            "by rounding"
        )
    if recipe.model.quantization == "int8" and device.type != "cpu":
        yield "int8: in each layer, bitsandbytes searches the inputs for large values, so the host waits"
    if kind_of(device).own_memory:
        yield "the predicted peak counts only tensors; the GPU's allocator reserves more memory, which is not predicted"
