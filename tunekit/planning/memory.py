"""Chooses the settings that save memory: rows per micro-batch, recomputed layers, size of logits chunks, streaming.

The sizes of micro-batches and logits chunks depend on memory.budget, never on free memory. Otherwise a run that is
resumed with a different amount of free memory would not be equal bit for bit. On a CPU, micro-batches of pairs get only
as many pairs as full speed needs.
Without a budget, free memory decides only two things, which change no bit: whether weights are streamed, and how many
layers are recomputed. The number of completions that are sampled together is halved until they fit; a resumed run keeps
this number.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from tunekit.errors import Problem
from tunekit.memory.sharding import TIER
from tunekit.memory.streaming import layer_bytes
from tunekit.objectives.losses.logprobs import CHUNK_BYTES, LEAST_CHUNK_TOKENS, logits_chunk_tokens
from tunekit.planning.cheaper import cheapest_changes
from tunekit.planning.execution import Estimate, SearchSpace, fastest, relative_time, smaller_micro_batches
from tunekit.planning.forecast import Forecast
from tunekit.planning.prepared import Prepared
from tunekit.planning.tiers import HOST_SHARE
from tunekit.recipe.recipe import Recipe
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings, bytes_text

# On a GPU, a logits chunk takes at least 1/128 of the memory: smaller products only wait for the head's weights.
DEVICE_SHARE = 128
MARGIN = {"cpu": 0.10}  # share of the usable memory that is left free: the promised accuracy of predictions
MARGIN_OF_A_GPU = 0.05
# Tokens of a micro-batch from which a CPU is at full speed. Measured on one core with AMX: forward, backward of 1,280
# tokens in pieces of 160, 320 and 640: in bfloat16, 1.62, 1.25 and 1.00 of the CPU seconds of one piece; in float32,
# about 1.15 of them in each.
FULL_SPEED_TOKENS, FULL_SPEED_TOKENS_16_BITS = 256, 768
EXAMINED_ROWS = 2_000  # rows whose mean length is taken
NEARLY_FULL = 0.8  # if the peak exceeds this share of a CPU's free memory, the longest batch is tried before step 1


def margin_of(device: torch.device) -> float:
    """The share of the usable memory that is left free for prediction errors."""
    return MARGIN.get(device.type, MARGIN_OF_A_GPU)


def choose_execution(
    prepared: Prepared, recipe: Recipe, space: SearchSpace, fixed: ExecutionSettings | None
) -> tuple[ExecutionSettings, list[str], list[Problem]]:
    """Simulate the largest batches, and choose the settings from `space`. Returns them, the reasons as notes, and
    problems if memory is too small. `fixed`: the settings whose `common` values are decided."""
    forecast, resources, budget = prepared.forecast, prepared.resources, prepared.recipe.memory.budget_bytes
    limit = usable_bytes(resources.device, budget, resources.free_bytes)
    sampled = (fixed.sampling_batch_size if fixed else 0) or forecast.sampled_together(limit)
    space = replace(space, written=replace(space.written, sampling_batch_size=sampled))
    time, shortages = _time_of(forecast), list[Problem]()
    fitting, execution = _choose(space, time, forecast, limit, budget)
    crowded = _host_shortage(prepared, execution)
    if crowded is not None and execution.activation_offload == "auto":
        space = replace(space, written=replace(space.written, activation_offload=False))
        fitting, execution = _choose(space, time, forecast, limit, budget)
    elif crowded is not None:
        shortages.append(Problem(crowded, "set memory.activation_offload: auto", key="memory.activation_offload"))
    shortages += _shortages(prepared, recipe, space, execution)
    if budget is None:
        reasons = list(_free_memory_reasons(prepared, space, execution, fitting is not None, fixed))
    else:
        reasons = list(_budget_reasons(prepared, space, execution, time, fitting is not None))
    if forecast.errors:
        model_type = prepared.base.facts.model_type
        reasons.append(f"warning: activations of {model_type} are not in the predicted peak ({forecast.errors[0]})")
    if crowded is not None and not execution.activation_offload:
        reasons.append(f"the inputs of recomputed layers stay on the device: {crowded}")
    return execution, [*reasons, *_rank_warnings(prepared, execution)], shortages


def _choose(
    space: SearchSpace, time: Estimate, forecast: Forecast, limit: float, budget: int | None
) -> tuple[ExecutionSettings | None, ExecutionSettings]:
    """The fastest choice within `limit` bytes, if there is one; and the choice of the run: this one or the smallest."""

    def needed(execution: ExecutionSettings) -> int:
        return forecast.known_peak(execution).total

    fitting = fastest(space, time, lambda execution: needed(execution) - limit)
    smallest = map(space.smallest, space.tiers[:1] if budget is None else space.tiers)
    return fitting, fitting or min(smallest, key=needed)


def _shortages(
    prepared: Prepared, recipe: Recipe, space: SearchSpace, execution: ExecutionSettings
) -> Iterator[Problem]:
    """Yields a problem if the run needs more than its budget or than the free memory."""
    memory, free = recipe.memory, prepared.resources.free_bytes
    budget, needed = memory.budget_bytes, prepared.forecast.known_peak(execution).total
    what = f"the run needs {bytes_text(needed)} at its peak, but only {bytes_text(free or 0)} are free"
    if budget is not None and needed > budget:
        what = f"the smallest setting of this run needs {bytes_text(needed)}, but the budget is {bytes_text(budget)}"
        yield Problem(what, cheapest_changes(prepared, recipe, execution, needed, budget), key="memory.budget")
    elif free is None or needed <= free:
        return
    elif budget is not None:
        yield Problem(what, f"set memory.budget below {bytes_text(free)}, or free memory", key="memory.budget")
    elif memory.gradient_checkpointing != "auto" and execution.checkpointed_layers < space.layers:
        yield Problem(what, "set memory.gradient_checkpointing: auto", key="memory.gradient_checkpointing")
    else:
        how = (
            "set memory.budget, so that plan chooses smaller micro-batches with the same rows per step; lower "
            f"data.max_length; or {recipe.adapter.less_memory}"
        )
        yield Problem(what, how, key="training.micro_batch_size")


def _host_shortage(prepared: Prepared, execution: ExecutionSettings) -> str | None:
    """A text if the inputs of layers, which are offloaded to pinned memory, leave too little of the host's memory."""
    resources, room = prepared.resources, prepared.resources.host_bytes
    offloaded = prepared.forecast.offloaded_bytes(execution)
    layers = layer_bytes(prepared.base) if execution.streaming == "host" else 0
    pinned = resources.ranks_here * (offloaded + layers)
    if not offloaded or room is None or pinned <= HOST_SHARE * room:
        return None
    return f"with them, {bytes_text(pinned)} of host memory would be pinned, but only {bytes_text(room)} are free"


def _rank_warnings(prepared: Prepared, execution: ExecutionSettings) -> Iterator[str]:
    """A warning if the ranks on a machine without GPUs need more memory together than is free. It is no refusal,
    because ranks may be on several machines, and this is known only to torchrun."""
    forecast, here, free = prepared.forecast, prepared.resources.ranks_here, prepared.resources.free_bytes
    peak = forecast.known_peak(execution)
    if prepared.resources.device.type != "cpu" or here == 1 or free is None or peak.total > free:
        return
    shared = peak.weights if execution.streaming != TIER and forecast.maps_weights(execution.streaming) else 0
    together = here * (peak.total - shared) + shared
    if together > free:
        yield (
            f"warning: if all {here} ranks are on this machine, they need {bytes_text(together)} together, but only "
            f"{bytes_text(free)} are free; start fewer ranks, or set memory.sharding: full"
        )


def usable_bytes(device: torch.device, budget: int | None, available: int | None) -> float:
    """The number of bytes that the run may use: the budget minus a margin. Without a budget: the free memory, on a GPU
    minus a margin.

    On a CPU, the free memory is not reduced, because the system can free more than it reports.
    """
    if budget is not None:
        return int(budget * (1 - margin_of(device)))
    if available is None or device.type == "cpu":
        return math.inf if available is None else available
    return int(available * (1 - margin_of(device)))


def search_space(
    prepared: Prepared,
    written: ExecutionSettings,
    tiers: Sequence[str],
    fixed: ExecutionSettings | None,
    resumed: ExecutionSettings | None,
) -> SearchSpace:
    """The settings that plan can choose from. Without a budget, only the number of recomputed layers and the place of
    the weights can vary.

    `written`: the recipe's settings. `tiers`: the allowed values of memory.streaming, fastest first. `fixed`: the
    settings whose micro-batches all ranks use. `resumed`: the settings of the run that is resumed; they are used again,
    except the number of recomputed layers, which changes no bit.
    """
    memory, text = prepared.recipe.memory, prepared.base.text
    vocabulary = 0 if text is None else text.vocabulary_size
    chunk_bytes = max(CHUNK_BYTES, (prepared.resources.total_bytes or 0) // DEVICE_SHARE)
    chunk = logits_chunk_tokens(vocabulary, chunk_bytes) if vocabulary else LEAST_CHUNK_TOKENS
    chunks, passes = [chunk], list[int]()
    if resumed is not None:
        chunks = [resumed.logits_chunk_tokens]
        if resumed.streaming in tiers:
            tiers, passes = [resumed.streaming], [resumed.pass_micro_batches]
    elif memory.budget is not None:
        chunks = [size for size in (chunk, chunk // 4, chunk // 16) if size >= LEAST_CHUNK_TOKENS]
    micro_batches = _micro_batches(prepared, fixed)
    return SearchSpace(
        micro_batches, chunks, memory.gradient_checkpointing, prepared.base.facts.layers, tiers, passes, written
    )


def _micro_batches(prepared: Prepared, fixed: ExecutionSettings | None) -> list[tuple[int | None, int]]:
    """Pairs of (rows per micro-batch, micro-batches per step) that plan can choose from."""
    recipe = prepared.recipe
    if fixed is not None:
        return [(fixed.micro_batch_size, fixed.gradient_accumulation_steps)]
    pair = (recipe.training.micro_batch_size, recipe.training.gradient_accumulation_steps)
    if prepared.resources.device.type == "cpu":
        pair = rows_at_full_speed(prepared)
    if recipe.memory.budget is not None and recipe.adapter.calibration is None:
        return smaller_micro_batches(*pair)
    return [pair]


def rows_at_full_speed(prepared: Prepared) -> tuple[int | None, int]:
    """The rows per micro-batch and micro-batches per step for a run on a CPU. Usually these are the recipe's numbers.

    If each row has several answers, a micro-batch gets only as many rows as full speed needs. A step still has the same
    rows, and activations take less memory.
    """
    training, rows, kind = prepared.recipe.training, prepared.rows.train, prepared.rows.objective.rows
    written = (training.micro_batch_size, training.gradient_accumulation_steps)
    if written[0] is None or not kind.layout.paired or prepared.recipe.adapter.calibration is not None:
        return written
    examined = [rows[at] for at in range(min(len(rows), EXAMINED_ROWS))]
    sizes = [kind.sizes_of(row.parts) for row in examined]
    tokens = (sum(map(sum, sizes)) - sum(map(kind.shared, examined))) / len(examined)
    enough = FULL_SPEED_TOKENS if prepared.base.dtype == torch.float32 else FULL_SPEED_TOKENS_16_BITS
    options = smaller_micro_batches(*written)
    return next((option for option in reversed(options) if (option[0] or 1) * tokens >= enough), written)


def _free_memory_reasons(
    prepared: Prepared, space: SearchSpace, execution: ExecutionSettings, fits: bool, fixed: ExecutionSettings | None
) -> Iterator[str]:
    """Yields notes on the settings of a run without a budget."""
    free, training = prepared.resources.free_bytes, prepared.recipe.training
    yield f"layers recomputed in the backward pass: {_recomputed(execution, space, fits, free)}"
    if execution.micro_batch_size != training.micro_batch_size and fixed is None:
        size = _micro_batches_text(execution, training)
        yield f"{size}, because they need less memory and are as fast on a CPU"


def _recomputed(execution: ExecutionSettings, space: SearchSpace, fits: bool, available: int | None) -> str:
    """A text that says which layers are recomputed, and why. For a run without a memory budget."""
    if execution.streaming != "off":
        weights = "gathered" if execution.streaming == TIER else "streamed"
        return f"all, because {weights} weights are on the device only while their layer runs"
    if space.gradient_checkpointing != "auto":
        return f"{execution.checkpointed_layers:,} of {space.layers:,}, as the recipe says"
    if not fits:
        return "all except the last, because the free memory is hardly enough for the step"
    if available is None:
        return "none, because the system does not report how much memory is free"
    return (
        "only as many as needed for the step to fit into memory"
        if execution.checkpointed_layers
        else "none, because the step fits into memory without recomputation"
    )


def _budget_reasons(
    prepared: Prepared, space: SearchSpace, execution: ExecutionSettings, time: Estimate, has_margin: bool
) -> Iterator[str]:
    """Yields notes on the settings that were chosen for the budget, and on settings that plan was not allowed to
    change. Nothing if no setting fits into the budget."""
    memory, training = prepared.recipe.memory, prepared.recipe.training
    if prepared.forecast.known_peak(execution).total > (memory.budget_bytes or 0):
        return
    margin = f"{margin_of(prepared.resources.device):.0%} of the budget is left free"
    note = f"{margin}, because predictions can be too low by this share"
    if not has_margin:
        note = f"warning: less than {margin}, but predictions can be too low by this share"
    slower = time(execution) / time(space.grid("off")[0])
    if execution.streaming == "off" and slower > 1.005:
        note += f"; a step takes about {slower:.2f} times as long as without a budget (a rough estimate)"
    yield f"memory.budget {memory.budget}: {_execution_text(execution, training, space.layers)}; {note}"
    if memory.gradient_checkpointing != "auto":
        yield "memory.gradient_checkpointing fixes the recomputed layers; set it to auto, so that plan chooses them"
    if training.micro_batch_size is None:
        yield "training.micro_batch_tokens is not reduced, because each step would then contain different rows"
    elif prepared.recipe.adapter.calibration is not None:
        yield "training.micro_batch_size is not changed, because the adapter's initialisation depends on it"


def _time_of(forecast: Forecast) -> Estimate:
    """A function that returns the relative time of a step with given settings, for the largest batch of the run."""
    training, facts = forecast.run.training, forecast.base.facts
    batch, text = forecast.largest_batch(training.micro_batch_size), forecast.base.text
    vocabulary = 0 if text is None else text.vocabulary_size
    return partial(
        relative_time,
        device=forecast.run.device.type,
        layers=facts.layers,
        row_tokens=batch.width if training.micro_batch_size is not None else batch.padded,
        step_tokens=batch.padded * training.gradient_accumulation_steps,
        head_share=min(1.0, vocabulary * facts.hidden_size / max(facts.total_parameters, 1)),
    )


def _micro_batches_text(execution: ExecutionSettings, training: TrainingSection) -> str:
    """The chosen micro-batches as text. If they differ from the recipe, the recipe's numbers follow."""
    rows, steps = execution.micro_batch_size, execution.gradient_accumulation_steps
    text = f"{steps:,} micro-batch{'' if steps == 1 else 'es'} of size {rows:,} a step"
    if rows == training.micro_batch_size:
        return text
    return f"{text} (the same rows as {training.gradient_accumulation_steps:,} of size {training.micro_batch_size:,})"


def _execution_text(execution: ExecutionSettings, training: TrainingSection, layers: int) -> str:
    """The chosen settings as text. If micro-batches differ from the recipe, the recipe's numbers follow."""
    parts = [] if execution.micro_batch_size is None else [_micro_batches_text(execution, training)]
    if execution.streaming == "off":
        parts.append(f"{execution.checkpointed_layers:,} of {layers:,} layers recomputed")
    else:
        parts.append(f"weights streamed (memory.streaming: {execution.streaming})")
    return ", ".join([*parts, f"logits of {execution.logits_chunk_tokens:,} positions at a time"])


def trial_reason(device: torch.device, needed: int, available: int | None, budget: int | None) -> tuple[bool, str]:
    """Whether the longest batch is run before step 1, and the reason as text."""
    if device.type != "cpu":
        return True, "on a GPU, the trial costs little time"
    if budget is not None:
        return True, "the run must not exceed memory.budget"
    if available is not None and needed > NEARLY_FULL * available:
        return True, f"the predicted peak is more than {NEARLY_FULL:.0%} of the free memory"
    return False, "the predicted peak is far below the free memory, so the longest batch is not tried before step 1"
