"""The notes of a plan: settings and data that may surprise. Also whether the base was trained on the token that ends
answers (if not, a frozen output head cannot learn this token), and how many steps fit into training.max_minutes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tunekit.adapters.module_names import base_modules, named_copies
from tunekit.adapters.tokens import tied_with, token_rows
from tunekit.artifacts.report.values import Values
from tunekit.artifacts.run import read_json
from tunekit.data.batching.steps import dealt
from tunekit.data.rows import RowSet
from tunekit.machine.devices import kind_of
from tunekit.machine.threads import processors
from tunekit.model.compute import computes_bfloat16
from tunekit.model.families import text_config
from tunekit.model.images.features import deep_layers
from tunekit.model.load import LoadedModel
from tunekit.model.pretrained import input_embedding
from tunekit.model.quantized.codec import FOUR_BIT
from tunekit.model.quantized.fp8 import computes_fp8
from tunekit.model.storage.mapped_files import MappedFiles
from tunekit.model.text.generation import end_of_turn_ids
from tunekit.model.text.slots import shared_length
from tunekit.objectives.rows.image_text import ImageTextRows
from tunekit.objectives.rows.row_images import feature_tokens
from tunekit.planning.forecast import token_ids
from tunekit.planning.prepared import Prepared
from tunekit.recipe.memory import size_bytes
from tunekit.recipe.recipe import Recipe
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings, bytes_text
from tunekit.training.schedules import rate_multiplier, warmup_steps
from tunekit.training.time_limit import KEY
from tunekit.tuned.fit import longest_tokens

HIGHEST_RATE = 0.3  # the learning rate of prompt tuning in Lester et al. 2021; other methods need far less
RATE_STEPS = 1000  # the learning rates of longer runs never sum to nearly 0
LEAST_RATES = 0.1
BUSY_SHARE = 0.9  # of the time; below it, a note says that processes wait for each other


def image_notes(recipe: Recipe, base: LoadedModel, rows: RowSet) -> Iterator[str]:
    """The size of the stored features of images."""
    kind = rows.objective.rows
    if not isinstance(kind, ImageTextRows) or not rows.objective.facts.get("images") or not recipe.data.image_cache:
        return
    tokens = sum(feature_tokens(some, kind.processor.token_id) for some in rows.all)
    size = tokens * base.facts.hidden_size * (1 + deep_layers(base.net)) * base.dtype.itemsize
    limit = size_bytes(recipe.data.image_cache)
    if size > limit:
        yield (
            f"warning: the features of all images take about {bytes_text(size)}, more than data.image_cache "
            f"({recipe.data.image_cache}): images are computed again in each epoch"
        )
    else:
        yield (
            f"data.image_cache: the features of all images take about {bytes_text(size)} of disk; from the second "
            "epoch, and in later runs, images are not computed again"
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


Made = TypeVar("Made")


SAMPLED_ROWS = 4096  # evenly spaced rows of the output matrix
READ_ROWS = 64  # rows of the data: nearly all of them contain an end of turn
NEAR = 0.3  # a row is untrained if its distance to the mean is below this share of the usual distance


def end_notes(prepared: Prepared) -> Iterator[str]:
    """Yields a warning for each end token in the rows that neither the base's training nor the adapter trains."""
    base, rows, adapter = prepared.base, prepared.rows, prepared.loaded.recipe.adapter
    tokenizer, head = prepared.context.processor.tokenizer, base.family.head_name(base.net)
    if tokenizer is None or head is None or not base.family.answers or adapter.trains_base:
        return
    ids = token_ids(rows.train, rows.objective.rows, READ_ROWS)
    ends = ids.intersection([*end_of_turn_ids(tokenizer, rows.template), tokenizer.eos_id])
    matrix = _matrix(prepared.stored.files, base.net, head) if ends else None
    modules = base_modules(base.net)
    wholly = {
        *named_copies(modules, getattr(adapter, "modules_to_save", None) or ()),
        *(each.name for each in prepared.context.targets),
    }
    if matrix is None or wholly & set(tied_with(modules, head)):
        return
    trained = token_rows(base.net, adapter).get(head)
    for end in sorted(ends - set(trained.ids if trained else ())):
        if _is_untrained(matrix, end):
            yield (
                f"warning: answers end with {tokenizer.decode([end])!r} (id {end}), but the base was never trained "
                f"on this token: its row in '{head}' is close to the mean of all rows. The adapter does not train "
                f"this row, so answers may never stop; write {_cure(base.net, head, end)}, or choose another end token "
                "with data.chat_template"
            )


def _cure(net: nn.Module, head: str, end: int) -> str:
    """The recipe line that trains the end token. If the output head is not tied to the embedding, the line names both,
    because PEFT applies a plain list only to the embedding."""
    modules = base_modules(net)
    embedding = next((name for name, module in modules.items() if module is input_embedding(net)), "")
    if not embedding or embedding in tied_with(modules, head):
        return f"adapter.trainable_token_indices: [{end}]"
    return f"adapter.trainable_token_indices: {{{embedding}: [{end}], {head}: [{end}]}}"


def _matrix(files: MappedFiles | None, net: nn.Module, head: str) -> Tensor | None:
    """The stored weight of the output head (V, D). None if the model is not downloaded, or if the weight is not stored
    in floating point."""
    if files is None:
        return None
    names = (f"{name}.weight" for name in (head, *tied_with(base_modules(net), head)))
    headers = files.headers
    stored = next((name for name in names if name in headers and headers[name].dtype.is_floating_point), None)
    return None if stored is None else files.view(stored)


def _is_untrained(matrix: Tensor, token: int) -> bool:
    """Whether the token's row of the matrix is unusually close to the mean of all rows, as rows of untrained tokens
    are."""
    rows = matrix[:: max(1, len(matrix) // SAMPLED_ROWS)].float()  # (S, D)
    mean = rows.mean(dim=0)  # (D,)
    usual = torch.linalg.vector_norm(rows - mean, dim=1).median()
    return bool(torch.linalg.vector_norm(matrix[token].float() - mean) < NEAR * usual)


def time_notes(recipe: Recipe, steps: int) -> Iterator[str]:
    """A note about the steps that fit into the limit, from the last report in output.dir."""
    training, folder = recipe.training, Path(recipe.output.dir)
    if training.limit_seconds is None:
        return
    report = Values(read_json(folder / "report.json") or {})
    seconds, done = report.numbers("seconds"), report.count("final_step")
    starts = [start.number("minutes") or 0.0 for start in report.parts("starts")]
    if not starts or not done:
        yield f"{KEY}: {training.max_minutes:g}; tunekit train RECIPE --dry-run estimates how many steps fit"
        return
    of_steps = sum(seconds.get(part, 0.0) for part in ("train", "evaluate", "save"))
    other = (60 * sum(starts) - of_steps) / len(starts)
    yield fitting_text(recipe, steps, training.limit_seconds - other, of_steps / done, f"the last run in {folder}")


def fitting_text(recipe: Recipe, steps: int, left_seconds: float, step_seconds: float, source: str) -> str:
    """A sentence about the steps that fit into the time that is left for steps. `source`: of the estimate."""
    training, limit = recipe.training, f"{KEY}: {recipe.training.max_minutes:g}"
    count, estimate = int(max(left_seconds, 0.0) / max(step_seconds, 1e-9)), f"(an estimate from {source})"
    if not count:
        needed = (training.limit_seconds or 0.0) - left_seconds + step_seconds
        return f"{limit}: probably no step fits into one start {estimate}; write at least {needed / 60:.1f}"
    fit = f"{limit}: about {min(count, steps):,} of {steps:,} steps fit into one start {estimate}"
    if count >= steps:
        return fit
    end = f"at {rate_multiplier(training, count, steps, warmup_steps(training, steps)):.0%} of training.learning_rate"
    return f"{fit}; the schedule then stops {end}, and the rest of its decay is lost unless --resume continues"
