"""Chooses the settings that save memory: rows per micro-batch, recomputed layers, size of logits chunks, streaming.

The sizes of micro-batches and logits chunks depend on memory.budget, never on free memory. Otherwise a run that is
resumed with a different amount of free memory would not be equal bit for bit. On a CPU, micro-batches of pairs get only
as many pairs as full speed needs.
Without a budget, free memory decides only two things, which change no bit: whether weights are streamed, and how many
layers are recomputed. The number of completions that are sampled together is halved until they fit; a resumed run keeps
this number.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tunekit.errors import Problem
from tunekit.machine.devices import is_here
from tunekit.machine.memory import available_bytes, total_bytes
from tunekit.memory.bandwidths import layer_bytes
from tunekit.memory.sharding import TIER
from tunekit.objectives.losses.logprobs import CHUNK_BYTES, LEAST_CHUNK_TOKENS, logits_chunk_tokens
from tunekit.planning.choice import SearchSpace, Workload, fastest, smaller_micro_batches
from tunekit.planning.findings import Findings
from tunekit.planning.forecast import Forecast
from tunekit.planning.ranks import ranks_here
from tunekit.planning.tiers import HOST_SHARE
from tunekit.recipe.training import TrainingSection
from tunekit.records import Choice, PeakBytes, bytes_text

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


def device_chunk_tokens(vocabulary_size: int, device: torch.device) -> int:
    """The default number of positions per logits chunk. It depends only on the vocabulary and the device."""
    total = total_bytes(device) if device.type != "cpu" else None
    return logits_chunk_tokens(vocabulary_size, max(CHUNK_BYTES, (total or 0) // DEVICE_SHARE))


def margin_of(device: torch.device) -> float:
    """The share of the usable memory that is left free for prediction errors."""
    return MARGIN.get(device.type, MARGIN_OF_A_GPU)


@dataclass(frozen=True)
class PlannedMemory:
    """The chosen settings with their reasons and their predicted peak. `tries_longest`: whether the longest batch is
    run before step 1."""

    choice: Choice
    reasons: tuple[str, ...]
    peak: PeakBytes
    tries_longest: bool
    trial_reason: str
    offloaded_bytes: int = 0  # pinned host memory, which is not part of a GPU's peak
    largest_tokens: int = 0  # tokens of the largest micro-batch, padding included
    budget_bytes: int | None = None


class Peaks:
    """The predicted peak of each choice of settings, cached. `unknown`: errors that made a simulation impossible."""

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self.unknown: list[str] = []
        self._known: dict[Choice, PeakBytes] = {}

    def of(self, choice: Choice) -> PeakBytes:
        """Peak bytes of a choice of settings, by part."""
        if choice not in self._known:
            try:
                self._known[choice] = self.forecast.peak(choice)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # the model's own code
                self.unknown.append(str(error).strip().partition("\n")[0])
                self._known[choice] = self.forecast.without_activations()
        return self._known[choice]

    def total(self, choice: Choice) -> int:
        """Total peak bytes of a choice."""
        return self.of(choice).total

    def sampled_together(self, limit: float) -> int:
        """The number of completions that are sampled together: the recipe's number, halved until they fit into `limit`
        bytes. 0 if the run samples no completions."""
        companions = self.forecast.run.companions.values()
        size = max((companion.sampling_batch_size for companion in companions), default=0)
        try:
            while size > 1 and self.forecast.sampling_peak(size) > limit:
                size = (size + 1) // 2
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # the model's own code; see `of`
            pass
        return size


def plan_memory(
    forecast: Forecast,
    tiers: Sequence[str],
    resumed: Choice | None,
    findings: Findings,
    cheaper: Callable[[Choice, int, int], str],
    shared: Choice | None = None,
) -> PlannedMemory:
    """Simulate the largest batches, and choose the settings.

    `tiers`: the allowed values of memory.streaming, fastest first.
    `resumed`: the settings of the run that is resumed. They are used again, except the number of recomputed layers,
    which changes no bit. `shared`: the settings whose micro-batches all ranks use.
    `cheaper`: a function that advises how to change the recipe; its arguments are a choice, the needed bytes and the
    available bytes.
    """
    run = forecast.run
    budget, peaks, available = run.memory.budget_bytes, Peaks(forecast), available_bytes(run.device)
    limit = usable_bytes(run.device, budget, available)
    space, workload = search_space(forecast, tiers, resumed, shared), make_workload(forecast)
    sampled = (shared.sampling_batch_size if shared else 0) or peaks.sampled_together(limit)
    space = replace(space, written=replace(space.written, sampling_batch_size=sampled))
    fitting, choice = _choose(space, workload, peaks, limit, budget)
    crowded = _host_shortage(peaks, choice)
    if crowded is not None and choice.activation_offload == "auto":
        space = replace(space, written=replace(space.written, activation_offload=False))
        fitting, choice = _choose(space, workload, peaks, limit, budget)
    elif crowded is not None:
        findings.lack(Problem(crowded, "set memory.activation_offload: auto", key="memory.activation_offload"))
    needed = peaks.total(choice)
    if budget is None:
        reasons = [
            f"layers recomputed in the backward pass: {_recomputed(choice, space, fitting is not None, available)}"
        ]
        if choice.micro_batch_size != run.training.micro_batch_size and shared is None:
            size = _micro_batches_text(choice, run.training)
            reasons.append(f"{size}, because they need less memory and are as fast on a CPU")
    elif needed <= budget:
        reasons = list(_budget_reasons(choice, forecast, space, workload, fitting is not None))
    else:
        reasons = []
        what = f"the smallest setting of this run needs {bytes_text(needed)}, but the budget is {bytes_text(budget)}"
        findings.lack(Problem(what, cheaper(choice, needed, budget), key="memory.budget"))
    if available is not None and needed > available and (budget is None or needed <= budget):
        setting = run.memory.gradient_checkpointing
        can_recompute = setting != "auto" and choice.checkpointed_layers < space.layers
        findings.lack(too_large_problem(needed, available, can_recompute, budget, run.adapter.less_memory))
    if peaks.unknown:
        model_type = forecast.base.facts.model_type
        reasons.append(f"warning: activations of {model_type} are not in the predicted peak ({peaks.unknown[0]})")
    if crowded is not None and not choice.activation_offload:
        reasons.append(f"the inputs of recomputed layers stay on the device: {crowded}")
    reasons += _rank_warnings(peaks, choice, available)
    trial = trial_reason(run.device, needed, available, budget)
    offloaded = 0 if peaks.unknown else forecast.offloaded_bytes(choice)
    tokens = forecast.largest_batch(choice.micro_batch_size).padded
    return PlannedMemory(choice, tuple(reasons), peaks.of(choice), *trial, offloaded, tokens, budget)


def _choose(
    space: SearchSpace, workload: Workload, peaks: Peaks, limit: float, budget: int | None
) -> tuple[Choice | None, Choice]:
    """The fastest choice within `limit` bytes, if there is one; and the choice of the run: this one or the smallest."""
    fitting = fastest(space, workload.relative_time, lambda choice: peaks.total(choice) - limit)
    smallest = map(space.smallest, space.tiers[:1] if budget is None else space.tiers)
    return fitting, fitting or min(smallest, key=peaks.total)


def _host_shortage(peaks: Peaks, choice: Choice) -> str | None:
    """A text if the inputs of layers, which are offloaded to pinned memory, leave too little of the host's memory."""
    forecast = peaks.forecast
    room = available_bytes(torch.device("cpu")) if is_here(forecast.run.device) else None
    peaks.total(choice)  # records an error of the model's code
    offloaded = 0 if peaks.unknown else forecast.offloaded_bytes(choice)
    layers = layer_bytes(forecast.base) if choice.streaming == "host" else 0
    pinned = ranks_here(forecast.run.device, choice.shares) * (offloaded + layers)
    if not offloaded or room is None or pinned <= HOST_SHARE * room:
        return None
    return f"with them, {bytes_text(pinned)} of host memory would be pinned, but only {bytes_text(room)} are free"


def _rank_warnings(peaks: Peaks, choice: Choice, available: int | None) -> Iterator[str]:
    """A warning if the ranks on a machine without GPUs need more memory together than is free. It is no refusal,
    because ranks may be on several machines, and this is known only to torchrun."""
    run, peak = peaks.forecast.run, peaks.of(choice)
    here = ranks_here(run.device, choice.shares)
    if run.device.type != "cpu" or here == 1 or available is None or peak.total > available:
        return
    shared = peak.weights if choice.streaming != TIER and peaks.forecast.maps_weights(choice.streaming) else 0
    together = here * (peak.total - shared) + shared
    if together > available:
        yield (
            f"warning: if all {here} ranks are on this machine, they need {bytes_text(together)} together, but only "
            f"{bytes_text(available)} are free; start fewer ranks, or set memory.sharding: full"
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
    forecast: Forecast, tiers: Sequence[str], resumed: Choice | None, shared: Choice | None
) -> SearchSpace:
    """The settings that plan can choose from. Without a budget, only the number of recomputed layers and the place of
    the weights can vary. `resumed`, `shared`: see plan_memory."""
    run, base = forecast.run, forecast.base
    written = (run.training.micro_batch_size, run.training.gradient_accumulation_steps)
    vocabulary = 0 if base.text is None else base.text.vocabulary_size
    chunk = device_chunk_tokens(vocabulary, run.device) if vocabulary else LEAST_CHUNK_TOKENS
    chunks, passes = [chunk], list[int]()
    if resumed is not None:
        chunks = [resumed.logits_chunk_tokens]
        if resumed.streaming in tiers:
            tiers, passes = [resumed.streaming], [resumed.pass_micro_batches]
    elif run.memory.budget is not None:
        chunks = [size for size in (chunk, chunk // 4, chunk // 16) if size >= LEAST_CHUNK_TOKENS]
    if shared is not None:
        micro_batches = [(shared.micro_batch_size, shared.gradient_accumulation_steps)]
    else:
        micro_batches = [rows_at_full_speed(forecast) if run.device.type == "cpu" else written]
        if run.memory.budget is not None and run.adapter.calibration is None:
            micro_batches = smaller_micro_batches(*micro_batches[0])
    setting, layers = run.memory.gradient_checkpointing, base.facts.layers
    return SearchSpace(micro_batches, chunks, setting, layers, tiers, passes, run.choice)


def rows_at_full_speed(forecast: Forecast) -> tuple[int | None, int]:
    """The rows per micro-batch and micro-batches per step for a run on a CPU. Usually these are the recipe's numbers.

    If each row has several answers, a micro-batch gets only as many rows as full speed needs. A step still has the same
    rows, and activations take less memory.
    """
    training, rows, kind = forecast.run.training, forecast.rows, forecast.run.objective.rows
    written = (training.micro_batch_size, training.gradient_accumulation_steps)
    if written[0] is None or not kind.layout.paired or forecast.run.adapter.calibration is not None:
        return written
    examined = [rows[at] for at in range(min(len(rows), EXAMINED_ROWS))]
    sizes = [kind.sizes_of(row.parts) for row in examined]
    tokens = (sum(map(sum, sizes)) - sum(map(kind.shared, examined))) / len(examined)
    enough = FULL_SPEED_TOKENS if forecast.base.dtype == torch.float32 else FULL_SPEED_TOKENS_16_BITS
    options = smaller_micro_batches(*written)
    return next((option for option in reversed(options) if (option[0] or 1) * tokens >= enough), written)


def _recomputed(choice: Choice, space: SearchSpace, fits: bool, available: int | None) -> str:
    """A text that says which layers are recomputed, and why. For a run without a memory budget."""
    if choice.streaming != "off":
        weights = "gathered" if choice.streaming == TIER else "streamed"
        return f"all, because {weights} weights are on the device only while their layer runs"
    if space.gradient_checkpointing != "auto":
        return f"{choice.checkpointed_layers:,} of {space.layers:,}, as the recipe says"
    if not fits:
        return "all except the last, because the free memory is hardly enough for the step"
    if available is None:
        return "none, because the system does not report how much memory is free"
    return (
        "only as many as needed for the step to fit into memory"
        if choice.checkpointed_layers
        else "none, because the step fits into memory without recomputation"
    )


def _budget_reasons(
    choice: Choice, forecast: Forecast, space: SearchSpace, workload: Workload, has_margin: bool
) -> Iterator[str]:
    """Yields notes on the settings that were chosen for the budget, and on settings that plan was not allowed to
    change."""
    run = forecast.run
    margin = f"{margin_of(run.device):.0%} of the budget is left free"
    note = f"{margin}, because predictions can be too low by this share"
    if not has_margin:
        note = f"warning: less than {margin}, but predictions can be too low by this share"
    slower = workload.relative_time(choice) / workload.relative_time(space.grid("off")[0])
    if choice.streaming == "off" and slower > 1.005:
        note += f"; a step takes about {slower:.2f} times as long as without a budget (a rough estimate)"
    yield f"memory.budget {run.memory.budget}: {_choice_text(choice, run.training, space.layers)}; {note}"
    if run.memory.gradient_checkpointing != "auto":
        yield "memory.gradient_checkpointing fixes the recomputed layers; set it to auto, so that plan chooses them"
    if run.training.micro_batch_size is None:
        yield "training.micro_batch_tokens is not reduced, because each step would then contain different rows"
    elif run.adapter.calibration is not None:
        yield "training.micro_batch_size is not changed, because the adapter's initialisation depends on it"


def make_workload(forecast: Forecast) -> Workload:
    """The properties of the run that determine its speed, from its largest batch."""
    training, facts = forecast.run.training, forecast.base.facts
    batch, text = forecast.largest_batch(training.micro_batch_size), forecast.base.text
    vocabulary = 0 if text is None else text.vocabulary_size
    return Workload(
        device=forecast.run.device.type,
        layers=facts.layers,
        row_tokens=batch.width if training.micro_batch_size is not None else batch.padded,
        step_tokens=batch.padded * training.gradient_accumulation_steps,
        head_share=min(1.0, vocabulary * facts.hidden_size / max(facts.total_parameters, 1)),
    )


def _micro_batches_text(choice: Choice, training: TrainingSection) -> str:
    """The chosen micro-batches as text. If they differ from the recipe, the recipe's numbers follow."""
    rows, steps = choice.micro_batch_size, choice.gradient_accumulation_steps
    text = f"{steps:,} micro-batch{'' if steps == 1 else 'es'} of size {rows:,} a step"
    if rows == training.micro_batch_size:
        return text
    return f"{text} (the same rows as {training.gradient_accumulation_steps:,} of size {training.micro_batch_size:,})"


def _choice_text(choice: Choice, training: TrainingSection, layers: int) -> str:
    """The chosen settings as text. If micro-batches differ from the recipe, the recipe's numbers follow."""
    parts = [] if choice.micro_batch_size is None else [_micro_batches_text(choice, training)]
    if choice.streaming == "off":
        parts.append(f"{choice.checkpointed_layers:,} of {layers:,} layers recomputed")
    else:
        parts.append(f"weights streamed (memory.streaming: {choice.streaming})")
    return ", ".join([*parts, f"logits of {choice.logits_chunk_tokens:,} positions at a time"])


def trial_reason(device: torch.device, needed: int, available: int | None, budget: int | None) -> tuple[bool, str]:
    """Whether the longest batch is run before step 1, and the reason as text."""
    if device.type != "cpu":
        return True, "on a GPU, the trial costs little time"
    if budget is not None:
        return True, "the run must not exceed memory.budget"
    if available is not None and needed > NEARLY_FULL * available:
        return True, f"the predicted peak is more than {NEARLY_FULL:.0%} of the free memory"
    return False, "the predicted peak is far below the free memory, so the longest batch is not tried before step 1"


def too_large_problem(
    needed: int, available: int, can_recompute: bool, budget: int | None, less_memory: str
) -> Problem:
    what = f"the run needs {bytes_text(needed)} at its peak, but only {bytes_text(available)} are free"
    if budget is not None:
        return Problem(what, f"set memory.budget below {bytes_text(available)}, or free memory", key="memory.budget")
    if can_recompute:
        return Problem(what, "set memory.gradient_checkpointing: auto", key="memory.gradient_checkpointing")
    how = (
        "set memory.budget, so that plan chooses smaller micro-batches with the same rows per step; lower "
        f"data.max_length; or {less_memory}"
    )
    return Problem(what, how, key="training.micro_batch_size")
