"""A Forecast and what the recipe asks for and leaves free go in; what is chosen for memory's sake comes out (rows at a
time, recomputed layers, logits at a time), and whether the run fits.

Only memory.budget changes micro-batches and logits chunks: the free memory of the moment must not decide what a resumed
run cannot repeat bit by bit. Without a budget it decides how many layers are recomputed, which changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tunekit.errors import Problem
from tunekit.machine.memory import available_bytes, total_bytes
from tunekit.objectives.logprobs import CHUNK_BYTES, LEAST_CHUNK_TOKENS, logits_chunk_tokens
from tunekit.planning.choice import (
    Freedom,
    Workload,
    checkpointed_layers,
    fastest,
    smaller_micro_batches,
    smallest_choice,
)
from tunekit.planning.findings import Findings
from tunekit.planning.forecast import Forecast
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.section import CalibratedStart
from tunekit.records import Choice, ModelFacts, PeakBytes, TextFacts, bytes_text

DEVICE_SHARE = 128  # of a GPU's memory, if that is more: its products of few rows only wait for the head's weights
MARGIN = {"cpu": 0.10, "cuda": 0.05}  # of a budget: as far off as a prediction is promised not to be
NEARLY_FULL = 0.8  # of the free memory of a CPU: from there on the longest batch is tried before step 1


def device_chunk_tokens(vocabulary_size: int, device: torch.device) -> int:
    """Positions projected at a time where nothing is scarce; the vocabulary and the kind of device alone decide."""
    total = total_bytes(device) if device.type == "cuda" else None
    return logits_chunk_tokens(vocabulary_size, max(CHUNK_BYTES, (total or 0) // DEVICE_SHARE))


@dataclass(frozen=True)
class Asked:
    """What the recipe says of memory, and what the plan of a resumed run had chosen."""

    memory: MemorySection
    written: Choice  # what the recipe alone decides
    start: object  # of the adapter
    packing: bool
    facts: ModelFacts
    text: TextFacts
    previous: Choice | None = None
    streaming: Sequence[str] = ("off",)  # tiers that recipe, family and adapter allow, fastest first
    break_even: Callable[[str], float] = lambda tier: 0.0  # tokens of a pass that hide a tier's copies; measured


@dataclass(frozen=True)
class PlannedMemory:
    """The choice and why, the peak with it, and whether the longest batch is tried before step 1 (and why)."""

    choice: Choice
    reasons: tuple[str, ...]
    peak: PeakBytes
    tries_longest: bool
    trial_reason: str
    offloaded_bytes: int = 0  # pinned memory of the host beside a GPU's peak
    largest_tokens: int = 0  # of a micro-batch, padding included


class Peaks:
    """The forecast's peak of each choice, asked for once; `unknown`: why activations are not in it."""

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self.unknown: list[str] = []
        self._known: dict[Choice, PeakBytes] = {}

    def of(self, choice: Choice) -> PeakBytes:
        """Peak bytes by part."""
        if choice not in self._known:
            try:
                self._known[choice] = self.forecast.peak(choice)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # the model's own code
                self.unknown.append(str(error).strip().partition("\n")[0])
                self._known[choice] = self.forecast.without_activations()
        return self._known[choice]

    def total(self, choice: Choice) -> int:
        """Bytes at the peak of the run."""
        return self.of(choice).total


def plan_memory(
    forecast: Forecast, asked: Asked, findings: Findings, cheaper: Callable[[Choice, int, int], str]
) -> PlannedMemory:
    """Simulate the largest batches and choose.

    `cheaper`: from a choice, the bytes that it needs and those there may be, what to change in the recipe.
    """
    device, budget = forecast.run.device, asked.memory.budget_bytes
    peaks, available = Peaks(forecast), available_bytes(device)
    freedom = make_freedom(asked, device)
    if budget is None:
        choice, reason = _within_free_memory(freedom, peaks, available)
        reasons = [f"recomputed in the backward pass: {reason}"]
    else:
        choice, reasons = _within_budget(freedom, forecast, asked, peaks, budget)
        if peaks.total(choice) > budget:
            reasons = []
            findings.lack(_budget_problem(peaks.total(choice), budget, cheaper(choice, peaks.total(choice), budget)))
    needed = peaks.total(choice)
    if available is not None and needed > available and (budget is None or needed <= budget):
        setting = asked.memory.gradient_checkpointing
        can_recompute = setting != "auto" and choice.checkpointed_layers < asked.facts.layers
        findings.lack(too_large_problem(needed, available, can_recompute, budget))
    if peaks.unknown:
        what = f"warning: activations of {asked.facts.model_type} are not in the predicted peak ({peaks.unknown[0]})"
        reasons.append(what)
    trial = trial_reason(device, needed, available, budget)
    offloaded = 0 if peaks.unknown else forecast.offloaded_bytes(choice)
    tokens = int(forecast.largest_batch(choice.micro_batch_size).input_ids.numel())
    return PlannedMemory(choice, tuple(reasons), peaks.of(choice), *trial, offloaded, tokens)


def make_freedom(asked: Asked, device: torch.device) -> Freedom:
    """What plan may choose: all axes within a budget, else the layers alone."""
    written = (asked.written.micro_batch_size, asked.written.gradient_accumulation_steps)
    chunk = device_chunk_tokens(asked.text.vocabulary_size, device)
    micro_batches, chunks = [written], [chunk]
    if asked.previous is not None:
        micro_batches = [(asked.previous.micro_batch_size, asked.previous.gradient_accumulation_steps)]
        chunks = [asked.previous.logits_chunk_tokens]
    elif asked.memory.budget is not None:
        chunks = [size for size in (chunk, chunk // 4, chunk // 16) if size >= LEAST_CHUNK_TOKENS]
        if not isinstance(asked.start, CalibratedStart):
            micro_batches = smaller_micro_batches(*written)
    tiers, passes = asked.streaming, []
    if asked.previous is not None and asked.previous.streaming in tiers:
        tiers, passes = [asked.previous.streaming], [asked.previous.pass_micro_batches]
    setting, layers = asked.memory.gradient_checkpointing, asked.facts.layers
    return Freedom(micro_batches, chunks, setting, layers, tiers, passes, asked.written)


def _within_free_memory(freedom: Freedom, peaks: Peaks, available: int | None) -> tuple[Choice, str]:
    """Recompute the fewest layers with which the run fits what is free; where none do, stream the weights."""
    start, reason = freedom.grid()[0], "every one: its weights are there only for a while"
    if start.streaming == "off":

        def peak(layers: int) -> int:
            return peaks.total(replace(start, checkpointed_layers=layers))

        layers, reason = checkpointed_layers(freedom.gradient_checkpointing, freedom.layers, peak, available)
        choice = replace(start, checkpointed_layers=layers)
        if available is None or peaks.total(choice) <= available:
            return choice, reason
    streamed = [choice for choice in freedom.grid() if choice.streaming != "off"]
    fitting = (choice for choice in streamed if available is None or peaks.total(choice) <= available)
    found = next(fitting, None)
    if found is None:
        return (choice, reason) if start.streaming == "off" else (streamed[-1], reason)
    return found, "every one: its weights are there only for a while"


def _within_budget(
    freedom: Freedom, forecast: Forecast, asked: Asked, peaks: Peaks, budget: int
) -> tuple[Choice, list[str]]:
    """The fastest choice with the margin left free; else the smallest that there is."""
    workload = make_workload(forecast, asked)
    margin = MARGIN[forecast.run.device.type]
    choice = fastest(freedom, workload.relative_time, peaks.total, int(budget * (1 - margin)))
    note = f"{margin:.0%} of it is left free, since a prediction may be off by as much"
    if choice is None:
        choice = smallest_choice(freedom, peaks.total)
        note = f"warning: less than {margin:.0%} of it is left free, and a prediction may be off by as much"
    ideal = freedom.grid()[0]
    slower = workload.relative_time(choice) / workload.relative_time(ideal)
    reasons = [f"memory.budget {asked.memory.budget}: {_choice_text(choice, asked)}; {note}"]
    if slower > 1.005:
        reasons[0] += f"; by a rough rule a step takes {slower:.2f} times as long as without a budget"
    return choice, [*reasons, *_fixed(asked)]


def make_workload(forecast: Forecast, asked: Asked) -> Workload:
    """What the cost of a choice depends on, from the largest batch."""
    rows, tokens = forecast.largest_batch(asked.written.micro_batch_size).input_ids.shape
    facts = asked.facts
    return Workload(
        device=forecast.run.device.type,
        layers=facts.layers,
        row_tokens=tokens if asked.written.micro_batch_size is not None else rows * tokens,
        step_tokens=rows * tokens * asked.written.gradient_accumulation_steps,
        head_share=min(1.0, asked.text.vocabulary_size * facts.hidden_size / max(facts.total_parameters, 1)),
        break_even_tokens={tier: asked.break_even(tier) for tier in asked.streaming if tier != "off"},
    )


def _choice_text(choice: Choice, asked: Asked) -> str:
    """What was chosen, beside the recipe's own numbers."""
    parts, rows = [], choice.micro_batch_size
    if rows is not None:
        unit = ("pack" if asked.packing else "row") + ("" if rows == 1 else "s")
        steps = choice.gradient_accumulation_steps
        parts.append(f"{steps:,} micro-batch{'' if steps == 1 else 'es'} of {rows:,} {unit} a step")
        if rows != asked.written.micro_batch_size:
            parts[-1] += (
                f" (the same as {asked.written.gradient_accumulation_steps:,} of {asked.written.micro_batch_size:,})"
            )
    if choice.streaming == "off":
        parts.append(f"{choice.checkpointed_layers:,} of {asked.facts.layers:,} layers recomputed")
    else:
        parts.append(f"weights streamed (memory.streaming: {choice.streaming})")
    parts.append(f"logits of {choice.logits_chunk_tokens:,} positions at a time")
    return ", ".join(parts)


def _fixed(asked: Asked) -> Iterator[str]:
    """What stays as it is written, and why."""
    if asked.memory.gradient_checkpointing != "auto":
        yield "recomputed layers stay as memory.gradient_checkpointing says; auto would let plan choose"
    if asked.written.micro_batch_size is None:
        yield "micro-batches stay as training.micro_batch_tokens cuts them: fewer tokens would end steps at other rows"
    elif isinstance(asked.start, CalibratedStart):
        yield "micro-batches stay as they are written: the adapter's start looks at so many of them"


def trial_reason(device: torch.device, needed: int, available: int | None, budget: int | None) -> tuple[bool, str]:
    """Whether the longest batch is tried before step 1, and why."""
    if device.type == "cuda":
        return True, "a GPU loses little time by it"
    if budget is not None:
        return True, "there is a budget to keep"
    if available is not None and needed > NEARLY_FULL * available:
        return True, f"the predicted peak is more than {NEARLY_FULL:.0%} of what is free"
    return False, "the predicted peak is far below what is free; --dry-run tries it"


def _budget_problem(needed: int, budget: int, how: str) -> Problem:
    what = f"the smallest setting of this run needs {bytes_text(needed)}, and the budget is {bytes_text(budget)}"
    return Problem(what, how, key="memory.budget")


def too_large_problem(needed: int, available: int, can_recompute: bool, budget: int | None = None) -> Problem:
    what = f"the run needs {bytes_text(needed)} at its peak, and {bytes_text(available)} are free"
    if budget is not None:
        return Problem(what, f"set memory.budget below {bytes_text(available)}, or free some", key="memory.budget")
    if can_recompute:
        return Problem(what, "set memory.gradient_checkpointing: auto", key="memory.gradient_checkpointing")
    how = (
        "set memory.budget to what the run may take (plan then chooses smaller micro-batches at the same rows a "
        "step), lower data.max_length, or quantize the base with model.quantization: nf4"
    )
    return Problem(what, how, key="training.micro_batch_size")
