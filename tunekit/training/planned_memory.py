"""How many layers are recomputed, how many positions are projected at a time, and whether the run fits.

Comes in: a Forecast and what the recipe asks for.  Goes out: PlannedMemory; a run too large is a finding.
Next: plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunekit.decisions import ModelFacts, PeakBytes, bytes_text
from tunekit.errors import Problem
from tunekit.memory.fit import checkpointed_layers
from tunekit.memory.machine import available_bytes
from tunekit.training.findings import Findings
from tunekit.training.forecast import Forecast

CHUNK_BYTES = 64 * 2**20  # of logits in float32
LEAST_CHUNK_TOKENS, MOST_CHUNK_TOKENS = 64, 1024


def logits_chunk_tokens(vocabulary_size: int) -> int:
    """Positions projected at a time: 64 MiB of float32 logits, within 64 and 1,024; the vocabulary alone decides."""
    return max(LEAST_CHUNK_TOKENS, min(MOST_CHUNK_TOKENS, CHUNK_BYTES // (4 * vocabulary_size)))


@dataclass(frozen=True)
class PlannedMemory:
    """Recomputed layers and the peak with them; `offloaded_bytes`: pinned memory of the host beside a GPU's peak."""

    layers: int
    reason: str
    peak: PeakBytes
    offloaded_bytes: int = 0


def plan_memory(
    forecast: Forecast, gradient_checkpointing: str | bool | int, facts: ModelFacts, findings: Findings
) -> PlannedMemory:
    """Simulate the largest batches and choose how many layers are recomputed."""
    predicted: dict[int, PeakBytes] = {}

    unknown: list[str] = []

    def predict(layers: int) -> int:
        if layers not in predicted:
            try:
                predicted[layers] = forecast.peak(layers)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # the model's own code
                unknown.append(str(error).strip().partition("\n")[0])
                predicted[layers] = forecast.without_activations()
        return predicted[layers].total

    available = available_bytes(forecast.run.device)
    layers, reason = checkpointed_layers(gradient_checkpointing, facts.layers, predict, available)
    needed = predict(layers)
    if available is not None and needed > available:
        findings.add([too_large_problem(needed, available, layers < facts.layers and gradient_checkpointing != "auto")])
    if unknown:
        reason += f"; warning: activations of {facts.model_type} are not in the predicted peak ({unknown[0]})"
    offloaded = 0 if unknown else forecast.offloaded_bytes(layers)
    return PlannedMemory(layers, reason, predicted[layers], offloaded)


def too_large_problem(needed: int, available: int, can_recompute: bool) -> Problem:
    how = "lower training.micro_batch_size or data.max_length, or quantize the base with model.quantization: nf4"
    if can_recompute:
        how = "set memory.gradient_checkpointing: auto"
    what = f"the run needs {bytes_text(needed)} at its peak, and {bytes_text(available)} are free"
    return Problem(what, how, key="memory.gradient_checkpointing" if can_recompute else "training.micro_batch_size")
